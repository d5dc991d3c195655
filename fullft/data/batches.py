"""Data: rows become token ids and labels, then micro-batches in an order that any step can be resumed from.

Owns tokenising, the target mask, the held-out split, the order, packing and padding. Reading files is `rows.py`'s
business, row formats are `templates.py`'s.
"""

import hashlib
import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import torch
from datasets import Dataset, Features, List, Value
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from fullft.config.config import Config
from fullft.data.formats import Rendered, RowError, RowFormat, find_format
from fullft.data.micro_batch import IGNORED, MicroBatch
from fullft.data.packing import pack
from fullft.data.sources import data_files, load_rows, locate, require_readable
from fullft.errors import DataError

# Part of the cache's key: raise it whenever this file turns the same rows into other tokens.
_TOKENISING_VERSION = 2
# Texts are handed to the tokenizer in groups of about so many characters: the spans of a thousand books at once would
# take tens of GB.
_CHARACTERS_PER_CALL = 4_000_000
# The columns of tokenised rows.
_TOKENISED = Features(
    {
        "row": Value("int64"),
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "num_tokens": Value("int32"),
        "num_target_tokens": Value("int32"),
        "truncated": Value("bool"),
        "largest_token_id": Value("int32"),
    }
)


class Batches:
    """Sequences in global batches. Which batch belongs to which step is a pure function of the seed and the step."""

    def __init__(self, rows: Dataset, config: Config, pad_token_id: int) -> None:
        """Assign rows to sequences.

        Args:
            rows: tokenised, as `load_data` makes them.
            config: `max_length`, `packing`, `seed`, the batch size and the accumulation count.
            pad_token_id: fills the end of a micro-batch's shorter sequences.
        """
        self.rows = rows
        self.lengths: list[int] = rows["num_tokens"][:]
        self.documents = pack(self.lengths, config.max_length) if config.packing else [[i] for i in range(len(rows))]
        self.packing = config.packing
        self.pad_token_id = pad_token_id
        self.seed = config.seed
        self.batch_size = config.per_device_train_batch_size
        self.sequences_per_step = int(config.global_batch_size or 0)
        self.steps_per_epoch = math.ceil(len(self.documents) / self.sequences_per_step)
        self._longest = max(map(self._length, range(len(self.documents))))
        self._order: tuple[int, list[int]] = (-1, [])  # the epoch under way, and its order

    def global_batch(self, step: int) -> list[MicroBatch]:
        """Make the micro-batches of one optimizer step, on the CPU.

        Args:
            step: counted from 1. An epoch's last global batch may be smaller.
        """
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        if self._order[0] != epoch:
            # The order depends on (seed, epoch) alone: no state to save, and no draw from torch's random stream.
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.documents))
            self._order = (epoch, order.tolist())
        start = position * self.sequences_per_step
        sequences = self._order[1][start : start + self.sequences_per_step]
        # Packed sequences, nearly all full, are padded to one length, which one compiled graph serves.
        return list(self._micro_batches(sequences, at_least=self._longest if self.packing else 0))

    def by_length(self) -> Iterator[MicroBatch]:
        """Make micro-batches of all sequences, the shortest first, for evaluation.

        Of short ones more come together, but no more tokens, padding included, than `largest` has.
        """
        sequences = sorted(range(len(self.documents)), key=self._length)
        room, start = self.batch_size * self._longest, 0
        for end in range(1, len(sequences) + 1):
            if end == len(sequences) or (end + 1 - start) * self._length(sequences[end]) > room:
                yield self._collate([self.documents[i] for i in sequences[start:end]])
                start = end

    def largest(self) -> MicroBatch:
        """Make a micro-batch of the longest sequences: none of the run takes more memory."""
        longest = sorted(range(len(self.documents)), key=lambda number: -self._length(number))
        micro_batch = next(self._micro_batches(longest[: self.batch_size]))
        # Others may have more targets: no more than all tokens.
        ids = micro_batch.inputs["input_ids"]
        return replace(micro_batch, labels=ids.clone(), num_target_tokens=ids[:, 1:].numel())

    def _length(self, sequence: int) -> int:
        return sum(self.lengths[i] for i in self.documents[sequence])

    @property
    def mean_length(self) -> float:
        """Tokens of the average sequence."""
        return sum(self.lengths) / len(self.documents)

    def _micro_batches(self, sequences: Sequence[int], at_least: int = 0) -> Iterator[MicroBatch]:
        for start in range(0, len(sequences), self.batch_size):
            yield self._collate([self.documents[i] for i in sequences[start : start + self.batch_size]], at_least)

    def _collate(self, batch: list[list[int]], at_least: int = 0) -> MicroBatch:
        """Join each sequence's documents, and pad to the longest sequence of the micro-batch, or to so many tokens."""
        sequences = [self.rows[documents] for documents in batch]
        shape = (len(batch), max(at_least, *(sum(sequence["num_tokens"]) for sequence in sequences)))
        input_ids = torch.full(shape, self.pad_token_id)
        labels = torch.full(shape, IGNORED)
        # Padding gets positions of its own from 0: to the model it is one more document, which nobody looks at.
        position_ids = torch.zeros(shape, dtype=torch.int64)
        for number, sequence in enumerate(sequences):
            end = sum(sequence["num_tokens"])
            input_ids[number, :end] = torch.tensor([token for ids in sequence["input_ids"] for token in ids])
            labels[number, :end] = torch.tensor([label for labels in sequence["labels"] for label in labels])
            position_ids[number, :end] = torch.cat([torch.arange(length) for length in sequence["num_tokens"]])
            position_ids[number, end:] = torch.arange(shape[1] - end)
        inputs = {"input_ids": input_ids}
        if self.packing:
            inputs["position_ids"] = position_ids
        return MicroBatch(
            inputs,
            labels,
            num_tokens=sum(sum(sequence["num_tokens"]) for sequence in sequences),
            num_target_tokens=sum(sum(sequence["num_target_tokens"]) for sequence in sequences),
        )


@dataclass(frozen=True)
class Data:
    """The rows of a run, split and batched.

    Attributes:
        train: the training batches.
        evaluation: the held-out batches, or None without any.
        largest_token_id: over all rows.
        fingerprint: changes when the tokenised rows do.
        description: lines that tell the user what was found.
    """

    train: Batches
    evaluation: Batches | None
    largest_token_id: int
    fingerprint: str
    description: str

    def largest(self, accumulation: int) -> tuple[list[MicroBatch], MicroBatch | None]:
        """Make the micro-batches that take most memory: for training, at most two, and for evaluation.

        Args:
            accumulation: micro-batches of one step. The second one finds gradients already there; more change nothing.
        """
        held_out = self.evaluation.largest() if self.evaluation is not None else None
        return [self.train.largest()] * min(2, accumulation), held_out

    @property
    def longest(self) -> int:
        """Tokens of the longest document, held-out ones included: as many positions as the model needs."""
        return max(max(batches.lengths) for batches in (self.train, self.evaluation) if batches is not None)


# ---------------------------------------------------------------------------------------------- assembly


def load_data(config: Config, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Load, tokenise, split and batch the rows.

    Args:
        config: the options of the group "model and data", the seed and the batch sizes count.
        tokenizer: fast, with an EOS token.

    Raises:
        DataError: the data cannot be read, fits no format, or leaves nothing to train on.
    """
    rows = load_rows(config)
    row_format = find_format(rows.column_names, str(config.dataset))
    tokenised = _tokenise_all(rows, row_format, tokenizer, config)
    if len(tokenised) == 0:
        raise DataError(
            f"{config.dataset}: none of the {len(rows)} rows has a token to learn: responses are empty, or "
            f"--max_length {config.max_length} cuts them off"
        )
    train_rows, held_out = _split(tokenised, len(rows), config)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Data(
        train=Batches(train_rows, config, pad),
        evaluation=Batches(held_out, config, pad) if len(held_out) else None,
        largest_token_id=max(tokenised["largest_token_id"][:]),
        fingerprint=_fingerprint(tokenised),
        description=_describe(rows, tokenised, held_out, row_format, tokenizer, config),
    )


def _split(tokenised: Dataset, num_rows: int, config: Config) -> tuple[Dataset, Dataset]:
    """Hold out the last ceil(val_size x rows) of a seeded shuffle of the rows."""
    units = np.asarray(tokenised["row"][:])
    if num_rows == 1:
        # One document: its pieces take the place of rows, or there would be nothing left to train on.
        units, num_rows = np.arange(len(tokenised)), len(tokenised)
    count = math.ceil(round(config.val_size * num_rows, 9))  # rounded first: 0.07 x 100 is 7.000000000000001
    # The order of `Dataset.shuffle(seed)`.
    held_out = np.isin(units, np.random.default_rng(config.seed).permutation(num_rows)[num_rows - count :])
    if held_out.all():
        raise DataError(f"{config.dataset} has too few rows to hold any out: --val_size 0 trains on all of them")
    return tokenised.select(np.flatnonzero(~held_out)), tokenised.select(np.flatnonzero(held_out))


# ---------------------------------------------------------------------------------------------- tokenising


def _tokenise_all(rows: Dataset, row_format: RowFormat, tokenizer: PreTrainedTokenizerBase, config: Config) -> Dataset:
    """Tokenise all rows, or take them from the cache of `datasets`."""
    # An own key: the library's would hash the tokenizer's whole state, which changes as it is used.
    options = (config.max_length, config.train_on_prompt, row_format.name)
    special_tokens = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    parts = (_TOKENISING_VERSION, rows._fingerprint, options, tokenizer.chat_template, special_tokens)
    key = hashlib.sha256(repr(parts).encode() + tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:32]
    try:
        return rows.map(
            lambda batch, indices: _tokenise_batch(batch, indices, row_format, tokenizer, config),
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            features=_TOKENISED,
            new_fingerprint=key,
            desc="Tokenising",
        )
    except UnicodeDecodeError as error:  # the JSON reader lets bytes that are no UTF-8 pass
        require_readable(data_files(str(config.dataset)))
        raise DataError(f"{config.dataset} is not UTF-8 text: {error.reason}") from error


def _fingerprint(tokenised: Dataset) -> str:
    """Hash what is trained on: the same rows in another file, or read again, are the same rows."""
    digest = hashlib.sha256()
    for batch in tokenised.with_format("arrow").iter(batch_size=1000):
        for name in ("row", "num_tokens"):
            digest.update(batch[name].to_numpy().tobytes())
        for name in ("input_ids", "labels"):
            for chunk in batch[name].chunks:
                digest.update(chunk.flatten().to_numpy().tobytes())
    return digest.hexdigest()[:32]


def _tokenise_batch(
    batch: dict[str, list[Any]],
    indices: list[int],
    row_format: RowFormat,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
) -> pyarrow.Table:
    rendered = []
    for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
        row = dict(zip(batch, values, strict=True))
        try:
            text = row_format.render(row, tokenizer)
        except RowError as error:
            raise DataError(f"{locate(config, index, row)}: {error}") from error
        # Else there is nothing to learn: an empty response, or no turn of the assistant.
        if text.targets or config.train_on_prompt:
            rendered.append((index, text))
    pieces, length, is_text = [], config.max_length, row_format.name == "text"
    for index, text, token_ids, encoding in _encode(rendered, tokenizer):
        ids, labels = _with_labels(text, token_ids, encoding, tokenizer.eos_token_id, config.train_on_prompt)
        for start in range(0, len(ids) if is_text else 1, length):
            piece = slice(start, start + length)
            pieces.append(_Piece(index, len(ids) > length and not is_text, ids[piece], labels[piece]))
    return _as_table(pieces)


class _Piece(NamedTuple):
    row: int
    truncated: bool
    input_ids: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]


def _as_table(pieces: Sequence[_Piece]) -> pyarrow.Table:
    """Make the columns of `_TOKENISED`, all rows of one at once: row by row it takes a tenth of tokenising's time."""
    if not pieces:
        return _TOKENISED.arrow_schema.empty_table()
    rows, truncated, all_ids, all_labels = zip(*pieces, strict=True)
    num_tokens = np.fromiter(map(len, all_ids), np.int32, len(pieces))
    starts, ids, labels = np.cumsum(num_tokens) - num_tokens, np.concatenate(all_ids), np.concatenate(all_labels)
    labels[starts] = IGNORED  # nothing comes before a first token that could predict it
    num_target_tokens = np.add.reduceat(labels != IGNORED, starts, dtype=np.int32)
    offsets = np.append(starts, len(ids)).astype(np.int32)
    columns = {
        "row": rows,
        "input_ids": pyarrow.ListArray.from_arrays(offsets, ids),
        "labels": pyarrow.ListArray.from_arrays(offsets, labels),
        "num_tokens": num_tokens,
        "num_target_tokens": num_target_tokens,
        "truncated": truncated,
        "largest_token_id": np.maximum.reduceat(ids, starts),
    }
    return pyarrow.table(columns, schema=_TOKENISED.arrow_schema).filter(pyarrow.array(num_target_tokens > 0))


def _encode(
    rendered: list[tuple[int, Rendered]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[int, Rendered, list[int], Encoding]]:
    """Tokenise texts in few calls, prompt and response together.

    Yields:
        For each row its index, its text, its token ids, and what is known of the tokens besides.
    """
    ends = np.cumsum([len(text.text) for _, text in rendered])
    for group in np.split(np.arange(len(rendered)), np.flatnonzero(np.diff(ends // _CHARACTERS_PER_CALL)) + 1):
        texts = [rendered[i] for i in group]
        if not texts:
            continue
        encoded = tokenizer(
            [text.text for _, text in texts],
            add_special_tokens=not texts[0][1].has_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for (index, text), ids, encoding in zip(texts, encoded["input_ids"], encoded.encodings, strict=True):
            yield index, text, ids, encoding


def _with_labels(
    text: Rendered, ids: list[int], encoding: Encoding, eos_token_id: int, train_on_prompt: bool
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Give the token ids of a row, closed by EOS, and its labels; masked by position, never by id."""

    def begin(token: int) -> int:
        # Asked for few tokens: as Python objects, the spans of all would cost a quarter more time.
        span = encoding.token_to_chars(token)
        return -1 if span is None else span[0]  # none: the tokenizer added it

    # Beginnings ascend, so that bisection finds a target's tokens, but for those that the tokenizer added behind.
    end = next((token for token in range(len(ids), 0, -1) if begin(token - 1) >= 0), 0)
    # The tokenizer may have appended EOS, and rows may end with it.
    has_eos = text.ends_turn or (len(ids) > 1 and ids[-1] == eos_token_id)
    input_ids = np.array(ids if has_eos else [*ids, eos_token_id], dtype=np.int32)
    labels = np.full_like(input_ids, IGNORED)
    for target in [(0, len(text.text))] if train_on_prompt else text.targets:
        learned = slice(*(bisect_left(range(end), place, key=begin) for place in target))
        labels[learned] = input_ids[learned]
    if not text.ends_turn:
        labels[-1] = eos_token_id
    return input_ids, labels


# ---------------------------------------------------------------------------------------------- showing


def _describe(
    rows: Dataset,
    tokenised: Dataset,
    held_out: Dataset,
    row_format: RowFormat,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
) -> str:
    """Sum the data up in two lines, and show how the first row is seen."""
    tokens, targets = sum(tokenised["num_tokens"][:]), sum(tokenised["num_target_tokens"][:])
    dropped = len(rows) - len(set(tokenised["row"][:]))
    truncated = sum(tokenised["truncated"][:])
    learned = "every token" if config.train_on_prompt or row_format.name == "text" else "the response"
    lines = [
        f"Data: {config.dataset}, format {row_format.name} ({', '.join(row_format.columns)}); "
        f"the loss counts {learned} and EOS",
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
