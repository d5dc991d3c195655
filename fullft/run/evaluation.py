"""Evaluation: the loss on held-out rows, and what the model writes.

Dropout's random state and the training mode are left as they were.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fullft.config.ranks import find_place
from fullft.data.batches import Batches
from fullft.data.load import Data
from fullft.data.micro_batch import IGNORED
from fullft.model.loss import LossSum
from fullft.model.probing import probing
from fullft.ranks import sum_over_ranks
from fullft.transforms.sharding import sharding_of
from fullft.transforms.streaming import stream_of

_TEXT_PROMPT_TOKENS = 16
_MAX_NEW_TOKENS = 48


def evaluate(
    model: PreTrainedModel, loss_sum: LossSum, batches: Batches | None, autocast: torch.autocast
) -> torch.Tensor | None:
    """Return the mean loss over all target tokens of the held-out rows.

    Args:
        model: evaluated where it is, in its own dtype.
        loss_sum: of the model.
        batches: None when no row is held out.
        autocast: the context that training computes in.

    Returns:
        A scalar on the model's device, in nats per token; None without rows.
    """
    if batches is None:
        return None
    losses, num_target_tokens = [], torch.zeros((), dtype=torch.float64)
    with probing(model):
        for micro_batch in batches.by_length():
            with autocast:
                losses.append(loss_sum(micro_batch.to(model.device)))
            num_target_tokens += micro_batch.num_target_tokens
    return sum_over_ranks(torch.stack(losses).sum()) / sum_over_ranks(num_target_tokens).item()


@dataclass
class Sample:
    """One prompt, what the row says comes next, and what the model writes before and after training."""

    prompt: str
    held_out: bool
    expected: str
    before: str | None = None
    after: str | None = None


class Samples:
    """The same few prompts, completed before and after training: one that is trained on, and three held-out ones.

    Args:
        data: where the prompts come from.
        tokenizer: decodes them.
        model: one whose layers are fetched for every token, from elsewhere or from other machines, completes none.
    """

    def __init__(self, data: Data, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        self.tokenizer = tokenizer
        chosen = [(False, data.train.rows[0])]
        if data.evaluation is not None:
            chosen += [(True, row) for row in data.evaluation.rows.select(range(min(3, len(data.evaluation.rows))))]
        if stream_of(model) is not None or (sharding_of(model).gathers_each_time and find_place().machines > 1):
            chosen = []
        self.prompts = [_prompt_ids(row["input_ids"], row["labels"]) for _, row in chosen]
        self.samples = []
        for ids, (held_out, row) in zip(self.prompts, chosen, strict=True):
            expected = _expected_ids(row["input_ids"], row["labels"], len(ids))
            self.samples.append(
                Sample(tokenizer.decode(ids), held_out, tokenizer.decode(expected, skip_special_tokens=True))
            )

    def complete(self, model: PreTrainedModel, autocast: torch.autocast, *, after: bool) -> None:
        """Complete every prompt greedily.

        Args:
            model: as it is now.
            autocast: the context that training computes in.
            after: whether training is over.
        """
        eos = self.tokenizer.eos_token_id
        generation = GenerationConfig(
            max_new_tokens=_MAX_NEW_TOKENS, do_sample=False, eos_token_id=eos, pad_token_id=eos
        )
        positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2**31
        for ids, sample in zip(self.prompts, self.samples, strict=True):
            ids = ids[-(max(1, positions - _MAX_NEW_TOKENS)) :]  # what is generated needs positions too
            prompt = torch.tensor([ids], device=model.device)
            with probing(model), _generating_by(model, generation), autocast:
                output = model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=generation,
                    # A rank that ended a token before the others would leave them waiting for its rows of the weights.
                    synced_gpus=dist.is_initialized(),
                )
            text = self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
            setattr(sample, "after" if after else "before", text)

    def describe(self) -> str:
        """Show each prompt with its completions, and with the row's own."""
        lines = []
        for sample in self.samples:
            kind = "held out" if sample.held_out else "trained on"
            lines.append(f"Prompt, {kind}: {_one_line(sample.prompt, 200)}")
            # Before training a model may write noise, of which a little is enough.
            shown = (("before", sample.before, 60), ("after", sample.after, 200), ("expected", sample.expected, 200))
            lines += [f"  {name + ':':10}{_one_line(text, most)}" for name, text, most in shown if text is not None]
        return "\n".join(lines)


@contextmanager
def _generating_by(model: PreTrainedModel, generation: GenerationConfig) -> Iterator[None]:
    """Replace a model's own settings: `generate` takes from them all that its argument leaves out, such as beams."""
    own = model.generation_config
    model.generation_config = generation
    try:
        yield
    finally:
        model.generation_config = own


def _prompt_ids(input_ids: list[int], labels: list[int]) -> list[int]:
    """Cut a row before its first target; plain text, which is all target, after a few tokens."""
    first_target = next(position for position, label in enumerate(labels) if label != IGNORED)
    return input_ids[: first_target if first_target > 1 else _TEXT_PROMPT_TOKENS]


def _expected_ids(input_ids: list[int], labels: list[int], start: int) -> list[int]:
    """Return what the row has behind a prompt: its first learned stretch, at most as long as a completion."""
    learned = itertools.takewhile(lambda place: labels[place] != IGNORED, range(start, len(labels)))
    return [input_ids[place] for place in learned][:_MAX_NEW_TOKENS]


def _one_line(text: str, most: int) -> str:
    """Join lines with ` | `, drop unprintable characters, and cut the middle of long text."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    shown = "".join(character for character in " | ".join(lines) if character.isprintable() and character != "\ufffd")
    return shown if len(shown) <= most else f"{shown[: most * 2 // 3]} ... {shown[-(most // 3 - 5) :]}"
