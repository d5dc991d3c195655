"""What the user is told about the data: counts, and an example with its mask."""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fullft.config.config import Config
from fullft.config.options import DEMO_ROWS
from fullft.data.formats import RowFormat
from fullft.data.micro_batch import IGNORED


def describe_data(
    rows: Dataset,
    tokenised: Dataset,
    held_out: Dataset,
    row_format: RowFormat,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
) -> str:
    """Sum the data up in two lines, and show how the first row is learned.

    Args:
        rows: as read.
        tokenised: what is left of them, pieces of long texts apart.
        held_out: those that are not trained on.
        row_format: that was recognised.
        tokenizer: decodes the example.
        config: the options that are named.
    """
    tokens, targets = sum(tokenised["num_tokens"][:]), sum(tokenised["num_target_tokens"][:])
    dropped = len(rows) - len(set(tokenised["row"][:]))
    truncated = sum(tokenised["truncated"][:])
    name = "the built-in demo" if config.dataset == DEMO_ROWS else config.dataset
    learned = "every token" if config.train_on_prompt or row_format.name == "text" else "the response"
    lines = [
        f"Data: {name}, format {row_format.name} ({', '.join(row_format.columns)}); the loss counts {learned} and EOS",
        f"      {len(rows):,} rows, {tokens:,} tokens, {targets / tokens:.0%} trained; {dropped} dropped (nothing to "
        f"learn), {truncated} cut at {config.max_length}; longest {max(tokenised['num_tokens'][:])} tokens, "
        f"mean {tokens / len(tokenised):.0f}; {len(held_out):,} held out",
        f"Example, with what is learned in [brackets]: {_show_example(tokenised[0], tokenizer)}",
    ]
    return "\n".join(lines)


def _show_example(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """Decode a row with its learned stretches in brackets, shortened in the middle of each stretch."""
    stretches: list[tuple[bool, list[int]]] = []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        learned = label != IGNORED
        if not stretches or stretches[-1][0] != learned:
            stretches.append((learned, []))
        stretches[-1][1].append(token)
    shown = ""
    for learned, ids in stretches:
        text = repr(tokenizer.decode(ids))[1:-1]
        text = text if len(text) <= 240 else f"{text[:140]} ... {text[-80:]}"
        shown += f"[{text}]" if learned else text
    return shown
