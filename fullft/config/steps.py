"""The steps of a run: how many there are, and at which of them something is due.

A step is an optimizer step. They are counted from 1.
"""

import math
from dataclasses import dataclass

from fullft.config.config import Config


@dataclass(frozen=True)
class Steps:
    """Answers "due now?" for each step.

    Attributes:
        config: the options of the group "records", and the length of the run.
        steps_per_epoch: global batches in the training rows, the last one perhaps smaller.
    """

    config: Config
    steps_per_epoch: int

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        if self.config.max_steps > 0:
            return self.config.max_steps
        return math.ceil(self.config.num_train_epochs * self.steps_per_epoch)

    def epoch(self, step: int) -> float:
        """Return the epochs done after a step."""
        return step / self.steps_per_epoch

    def log_due(self, step: int) -> bool:
        """Return whether to log: the first step, every `logging_steps`, and the last."""
        return step == 1 or step % self.config.logging_steps == 0 or step == self.total

    def evaluation_due(self, step: int) -> bool:
        """Return whether to evaluate; the last step always is, under any strategy."""
        return step == self.total or self._due(self.config.eval_strategy, self.config.eval_steps, step)

    def checkpoint_due(self, step: int) -> bool:
        """Return whether to save a checkpoint."""
        last = step == self.total and self.config.save_strategy != "no"
        return last or self._due(self.config.save_strategy, self.config.save_steps, step)

    @property
    def num_checkpoints(self) -> int:
        """The number of checkpoints that a whole run saves."""
        if self.config.save_strategy == "no":
            return 0
        return math.ceil(self.total / self._every(self.config.save_strategy, self.config.save_steps))

    def _every(self, strategy: str, every: int) -> int:
        return self.steps_per_epoch if strategy == "epoch" else every

    def _due(self, strategy: str, every: int, step: int) -> bool:
        return strategy != "no" and step % self._every(strategy, every) == 0

    def describe(self) -> str:
        """Say what one step consists of, and how many there are."""
        config = self.config
        if config.micro_batch_tokens:
            return f"{self._describe_dealing()}, {self.steps_per_epoch} steps per epoch, {self.total} steps"
        factors = (config.per_device_train_batch_size, config.gradient_accumulation_steps, config.gpus)
        product = f"{factors[0]} x {factors[1]} x " + (f"{config.gpus} ranks" if config.gpus > 1 else "1 device")
        whole = f"{config.global_batch_size} sequences per step"
        is_even = math.prod(factors) == config.global_batch_size
        batch = f"{product} = {whole}" if is_even else f"{whole}, at most {product}"
        return f"{batch}, {self.steps_per_epoch} steps per epoch, {self.total} steps"

    def _describe_dealing(self) -> str:
        config = self.config
        count = config.gradient_accumulation_steps
        several = "one micro-batch" if count == 1 else f"at most {count} micro-batches"
        on_each = f" on each of {config.gpus} ranks" if config.gpus > 1 else ""
        most = f"at most {config.micro_batch_tokens:,} tokens{on_each}"
        return f"{config.global_batch_size} sequences per step in {several} of {most}"
