"""The log of a run: what happened, as the loop says, shown and recorded. All ranks know it.

The files are the business of `records.py`. The loop's one wait for the device per step is here, in `require_finite`.
"""

import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from fullft.config.config import Config
from fullft.config.numerics import Format
from fullft.config.steps import Steps
from fullft.errors import NonFiniteError
from fullft.hardware import peak_bytes, peak_flops
from fullft.model.parts import count_parameters, flops_per_token
from fullft.ranks import by_first_rank, is_first, sum_over_ranks
from fullft.run.evaluation import Samples
from fullft.run.records import records_of
from fullft.saving.best import Exported

_NON_FINITE_REMEDY = (
    "resume from the last checkpoint with a lower --learning_rate or a longer --warmup_steps (--allow_changes), or "
    "look for broken rows"
)


class Log:
    """Shows and records what happens. A context manager around the loop.

    Args:
        config: the options of the group "records", and `output_dir`.
        steps: says when to log.
        model: its size, device and speed are reported.
        mean_length: tokens of the average sequence.
        first_step: above 1 for a resumed run; the log's records from there on are dropped.
    """

    def __init__(
        self, config: Config, steps: Steps, model: PreTrainedModel, mean_length: float, first_step: int
    ) -> None:
        self.config, self.steps, self.device, self.first_step = config, steps, model.device, first_step
        self.num_parameters = count_parameters(model)
        self.flops_per_token = flops_per_token(model, mean_length)
        self.peak_flops = peak_flops(model.device) if config.numerics.computation is Format.BF16 else None
        self.records: list[dict[str, Any]] = []
        self._kept = records_of(config)
        self.eval_losses: dict[int, float] = {}  # by step
        self.loss = self.grad_norm = math.nan
        self.seconds = self._interval_seconds = 0.0
        self.num_tokens = self._interval_tokens = 0

    def __enter__(self) -> "Log":
        """Open the log and the bar."""
        self.records = by_first_rank(lambda: self._kept.open(self.first_step))
        self.eval_losses = {record["step"]: record["eval_loss"] for record in self.records if "eval_loss" in record}
        self._bar = tqdm(
            total=self.steps.total,
            initial=self.first_step - 1,
            unit="step",
            desc="Training",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 10.0,  # a log file wants few lines
            disable=not is_first(),
        )
        if self.config.compiles:
            self._bar.set_postfix_str("compiling")
        self._mark = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        """Close the bar, and draw the records so far, also when the run has failed."""
        self._bar.close()
        self._kept.draw(self.records)

    def say(self, text: str) -> None:
        """Print above the bar."""
        self._bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    # ------------------------------------------------------------------------------------------ what happened

    def require_finite(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Read the step's loss and gradient norm, before the optimizer uses the gradients.

        This is the loop's one wait for the device per step: a NaN must not reach the weights.

        Args:
            step: counted from 1.
            loss: scalar, this rank's share of the mean over the target tokens of the global batch.
            grad_norm: scalar, before clipping, of the gradients of all ranks.

        Raises:
            NonFiniteError: one of them is NaN or infinite.
        """
        self.loss, self.grad_norm = sum_over_ranks(loss).item(), grad_norm.item()
        if not (math.isfinite(self.loss) and math.isfinite(self.grad_norm)):
            raise NonFiniteError(
                f"step {step}: the loss is {self.loss}, the gradient norm {self.grad_norm}; the step was not taken\n"
                f"{_NON_FINITE_REMEDY}"
            )

    def step(self, step: int, learning_rate: float, num_tokens: int, num_target_tokens: int) -> None:
        """Record an optimizer step.

        Args:
            step: counted from 1.
            learning_rate: that the step was taken with.
            num_tokens: of all ranks, without padding.
            num_target_tokens: that the loss is the mean of.
        """
        elapsed = self._elapsed()
        self.seconds += elapsed
        self._interval_seconds += elapsed
        self.num_tokens += num_tokens
        self._interval_tokens += num_tokens
        speed = self._interval_tokens / self._interval_seconds
        speed_of_each = speed / self.config.gpus
        mfu = speed_of_each * self.flops_per_token / self.peak_flops if self.peak_flops else None
        memory = peak_bytes(self.device)
        self._bar.set_postfix_str(
            f"loss {self.loss:.4f}, {speed:,.0f} tokens/s, MFU {'unknown' if mfu is None else f'{mfu:.0%}'}, "
            f"{memory / 2**30:.2f} GiB",
            refresh=False,
        )
        self._bar.update()
        if self.steps.log_due(step):
            self._record(
                {
                    "step": step,
                    "epoch": round(self.steps.epoch(step), 4),
                    "loss": self.loss,
                    "grad_norm": self.grad_norm,
                    "learning_rate": learning_rate,
                    "num_tokens": num_tokens,
                    "num_target_tokens": num_target_tokens,
                    "tokens_per_second": speed,
                    "mfu": mfu,
                    "memory_bytes": memory,
                }
            )
            self._interval_tokens, self._interval_seconds = 0, 0.0

    def evaluation(self, step: int, loss: torch.Tensor | None) -> None:
        """Record an evaluation.

        Args:
            step: the last finished step; 0 before training.
            loss: scalar, mean over the held-out target tokens of all ranks; None without held-out rows.

        Raises:
            NonFiniteError: the loss is NaN or infinite.
        """
        if loss is not None:
            eval_loss = loss.item()
            if not math.isfinite(eval_loss):
                raise NonFiniteError(f"step {step}: the held-out loss is {eval_loss}; {_NON_FINITE_REMEDY}")
            self.eval_losses[step] = eval_loss
            perplexity = math.exp(min(eval_loss, 700.0))  # exp(710) is no float
            self._record({"step": step, "eval_loss": eval_loss, "eval_perplexity": perplexity})
            self.say(f"Step {step}: held-out loss {eval_loss:.4f}, perplexity {perplexity:,.2f}")
        self._elapsed()  # evaluation is no training time

    def checkpoint(self, folder: Path) -> None:
        """Record that a checkpoint was saved."""
        self.say(f"Saved {folder}")
        self._elapsed()

    def results(self, exported: Exported) -> dict[str, Any]:
        """Sum the run up, and write it to `train_results.json`.

        Args:
            exported: which weights the final model has.
        """
        losses = [record for record in self.records if "loss" in record]
        results = {
            "steps": self.steps.total,
            "epochs": self.steps.epoch(self.steps.total),
            "num_parameters": self.num_parameters,
            "first_loss": losses[0]["loss"] if losses else None,
            "last_loss": losses[-1]["loss"] if losses else None,
            "exported_step": exported.step,
            "eval_loss_before": self.eval_losses.get(0),
            "eval_loss_after": exported.eval_loss,
            "train_seconds": self.seconds,
            "train_tokens": self.num_tokens,
            "tokens_per_second": self.num_tokens / self.seconds if self.seconds else None,
            "peak_memory_bytes": peak_bytes(self.device),
            "resumed_at_step": self.first_step - 1 or None,
        }
        self._kept.write_results(results)
        return results

    def samples(self, results: dict[str, Any], samples: Samples) -> None:
        """Write the results once more, with prompts and what the model made of them."""
        completed = {"samples": [asdict(sample) for sample in samples.samples]}
        self._kept.write_results(results | completed)

    def _record(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self._kept.add(record)

    def _elapsed(self) -> float:
        """Return the seconds since the last call."""
        mark, self._mark = self._mark, time.perf_counter()
        return self._mark - mark


def describe_results(results: dict[str, Any]) -> str:
    """Say in one line what a run achieved."""
    before, after = results["eval_loss_before"], results["eval_loss_after"]
    held_out = ""
    if after is not None:
        held_out = f"; held-out loss {'?' if before is None else f'{before:.4f}'} -> {after:.4f}"
    if results["exported_step"] != results["steps"]:
        held_out += f" (exported: step {results['exported_step']})"
    loss = "" if results["first_loss"] is None else f"loss {results['first_loss']:.4f} -> {results['last_loss']:.4f}"
    minutes, seconds = divmod(round(results["train_seconds"]), 60)
    time_taken = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    speed = results["tokens_per_second"]
    pace = "" if speed is None else f", {speed:,.0f} tokens/s"
    return f"Done: {results['steps']} steps, {loss}{held_out}; {time_taken}{pace}"
