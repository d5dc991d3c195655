"""What the user is told about the data: counts, what was left out, and an example with its mask."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fullft.config.config import Config
from fullft.config.options import DEMO_ROWS
from fullft.data.formats import RowFormat
from fullft.data.micro_batch import IGNORED
from fullft.data.rows import Rows
from fullft.data.template import ChatTemplate


def describe_data(
    rows: Rows,
    tokenised: Dataset,
    num_held_out: int,
    row_format: RowFormat,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
) -> str:
    """Sum the data up in two lines, say what of it is not trained on, and show how the first row is learned.

    Args:
        rows: as read.
        tokenised: what is left of them, pieces of long texts apart.
        num_held_out: rows that are not trained on.
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
        f"mean {tokens / len(tokenised):.0f}; {num_held_out:,} held out",
        *(f"      {note}" for note in notes_on(rows, tokenised, row_format, tokenizer, config)),
        f"Example, with what is learned in [brackets]: {show_row(tokenised[0], tokenizer, most=240)}",
    ]
    return "\n".join(lines)


def notes_on(
    rows: Rows, tokenised: Dataset, row_format: RowFormat, tokenizer: PreTrainedTokenizerBase, config: Config
) -> list[str]:
    """Say what happened to rows besides, each once: what was split, kept out or left out.

    Args:
        rows: as read.
        tokenised: what is left of them.
        row_format: that was recognised.
        tokenizer: has the template.
        config: the options that are named.
    """
    notes = []
    numbers: list[int] = tokenised["row"][:]
    split = [number for number, is_split in zip(numbers, tokenised["is_split"][:], strict=True) if is_split]
    if split:
        notes.append(
            f"{_counted(len(set(split)), 'conversation')} became {_counted(len(split), 'row')}, one per turn of the "
            "assistant: the chat template writes earlier turns differently"
        )
    if count := sum(tokenised["num_kept_out"][:]):
        notes.append(
            f"{_counted(count, 'turn')} of the assistant kept out of the loss (weight, train, training or loss)"
        )
    if count := sum(tokenised["num_silent"][:]):
        notes.append(f"{_counted(count, 'turn')} of the assistant without a word, not learned")
    if count := sum(tokenised["num_unmarked"][:]):
        notes.append(f"{_counted(count, 'turn')} of the assistant outside the chat template's marks, not learned")
    special = [number for number, has in zip(numbers, tokenised["has_special"][:], strict=True) if has]
    if special:
        treated = (
            "are encoded as plain text"
            if config.sanitize_special_tokens
            else "control the model there; --sanitize_special_tokens encodes them as plain text"
        )
        notes.append(
            f"{_counted(len(set(special)), 'row')} with special tokens in the text itself ({rows.place(special[0])}), "
            f"which {treated}"
        )
    if any(tokenised["leaves_eos_out"][:]):
        notes.append("the chat template's marks leave out the EOS behind a turn: the model does not learn to stop")
    fields = sorted({name for names in set(tokenised["unread_fields"][:]) for name in names.split()})
    if fields:
        notes.append(f"fields of messages that the chat template does not read: {_listed(fields)}")
    if unread := row_format.unread(rows.column_names, ChatTemplate(tokenizer)):
        notes.append(f"columns that nothing reads: {_listed(unread)}")
    if rows.left_out:
        notes.append(f"files of the folder that are not read: {_listed(rows.left_out)}")
    return notes


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def _listed(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def show_row(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, most: int | None = None) -> str:
    """Decode a row with its learned stretches in brackets.

    Args:
        row: tokenised.
        tokenizer: decodes it.
        most: characters of a stretch, which is shortened in its middle; None shows all, with line ends as they are.
    """
    stretches: list[tuple[bool, list[int]]] = []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        learned = label != IGNORED
        if not stretches or stretches[-1][0] != learned:
            stretches.append((learned, []))
        stretches[-1][1].append(token)
    shown = ""
    for learned, ids in stretches:
        text = tokenizer.decode(ids)
        if most is not None:
            text = repr(text)[1:-1]
            text = text if len(text) <= most else f"{text[: most - 100]} ... {text[-80:]}"
        shown += f"[{text}]" if learned else text
    return shown
