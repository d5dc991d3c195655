"""What the user is told about the data: counts, what was left out, and an example with its mask."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fullft.config.config import Config
from fullft.config.options import DEMO_ROWS
from fullft.data.micro_batch import IGNORED
from fullft.data.template import ChatTemplate
from fullft.data.tokenise import TokenisedRows


def describe_data(
    own: TokenisedRows,
    elsewhere: TokenisedRows | None,
    num_held_out: int,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
) -> str:
    """Sum the data up in two lines, say what of it is not trained on, and show how the first row is learned.

    Args:
        own: the rows of `--dataset`.
        elsewhere: held-out rows that have a source of their own.
        num_held_out: rows that are not trained on.
        tokenizer: decodes the example.
        config: the options that are named.
    """
    rows, row_format, tokenised = own
    tokens, targets = sum(tokenised["num_tokens"][:]), sum(tokenised["num_target_tokens"][:])
    name = "the built-in demo" if config.dataset == DEMO_ROWS else config.dataset
    learned = "every token" if config.train_on_prompt or row_format.name == "text" else "the response"
    notes = notes_on(own, tokenizer, config)
    if elsewhere is not None:
        given, changes = elsewhere.rows, count_changes(elsewhere, config)
        notes.append(f"held out: {given.name}, split {given.split}, {_counted(len(given), 'row')}; {changes}")
        if shared := _num_shared(tokenised, elsewhere.tokens):
            notes.append(
                f"held out: {_counted(shared, 'row')} of them may be trained on as well: the rows are the same"
            )
        its_notes = notes_on(elsewhere, tokenizer, config)
        notes += [f"held out: {note}" for note in its_notes if note not in notes]
    lines = [
        f"Data: {name}, format {row_format.name} ({', '.join(row_format.columns)}); the loss counts {learned} and EOS",
        f"      {_counted(len(rows), 'row')}, {tokens:,} tokens, {targets / tokens:.0%} trained; "
        f"{count_changes(own, config)}; longest {max(tokenised['num_tokens'][:])} tokens, "
        f"mean {tokens / len(tokenised):.0f}; {num_held_out:,} held out",
        *(f"      {note}" for note in notes),
        f"Example, with what is learned in [brackets]: {show_row(tokenised[0], tokenizer, most=240)}",
    ]
    return "\n".join(lines)


def count_changes(source: TokenisedRows, config: Config) -> str:
    """Count the rows that are not trained on as they stand in the data.

    Args:
        source: of the rows.
        config: `max_length` is named.
    """
    rows, _, tokenised = source
    counts = [f"{len(rows) - len(set(tokenised['row'][:]))} dropped (nothing to learn)"]
    if split := _rows_where(tokenised, "is_split"):
        counts.append(f"{len(set(split)):,} split per turn into {len(split):,}")
    if num_kept_out := sum(tokenised["num_kept_out"][:]):
        counts.append(f"{_counted(num_kept_out, 'turn')} masked by weight")
    if num_silent := sum(tokenised["num_silent"][:]):
        counts.append(f"{_counted(num_silent, 'turn')} masked, without a word")
    if num_unmarked := sum(tokenised["num_unmarked"][:]):
        counts.append(f"{_counted(num_unmarked, 'turn')} masked, outside the chat template's marks")
    return ", ".join([*counts, f"{sum(tokenised['truncated'][:])} cut at {config.max_length}"])


def _rows_where(tokenised: Dataset, column: str) -> list[int]:
    return [row for row, is_so in zip(tokenised["row"][:], tokenised[column][:], strict=True) if is_so]


def notes_on(source: TokenisedRows, tokenizer: PreTrainedTokenizerBase, config: Config) -> list[str]:
    """Say, each once, what a user might not expect: why rows were split, and what is not read.

    Args:
        source: of the rows.
        tokenizer: has the template.
        config: the options that are named.
    """
    rows, row_format, tokenised = source
    notes = []
    if any(tokenised["is_split"][:]):
        notes.append("split per turn: the chat template writes earlier turns differently once others follow")
    if special := _rows_where(tokenised, "has_special"):
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


def _num_shared(tokenised: Dataset, held_out: Dataset) -> int:
    """Return how many held-out rows have the tokens of one in the other table."""

    def digests(table: Dataset) -> Iterator[bytes]:
        for batch in table.with_format("arrow").iter(batch_size=1000):
            for ids in batch["input_ids"]:
                yield hashlib.blake2b(ids.values.to_numpy(zero_copy_only=False).tobytes(), digest_size=16).digest()

    known = set(digests(tokenised))
    return sum(digest in known for digest in digests(held_out))


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
