"""Tokenising: rows become token ids and labels. What is learned is marked by position, never by id."""

import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from datasets import Dataset, Features, List, Value
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from fullft.config.config import Config
from fullft.data.formats import RowFormat
from fullft.data.micro_batch import IGNORED
from fullft.data.rendered import Rendered, RowError
from fullft.data.sources import data_files, locate, require_readable
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


def tokenise(rows: Dataset, row_format: RowFormat, tokenizer: PreTrainedTokenizerBase, config: Config) -> Dataset:
    """Tokenise all rows, or take them from the cache of `datasets`.

    Args:
        rows: as read, under our column names.
        row_format: renders each row.
        tokenizer: fast, with an EOS token.
        config: `max_length` and `train_on_prompt` are read.

    Returns:
        The columns of `_TOKENISED`, without rows that have nothing to learn.

    Raises:
        DataError: a row does not hold what its format needs, or is not UTF-8 text.
    """
    # A key of our own, from a private fingerprint of the rows (a hash of all content would read every row anew): the
    # library's would hash the tokenizer's whole state, which changes as it is used.
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
        require_readable(data_files(config.dataset))
        raise DataError(f"{config.dataset} is not UTF-8 text: {error.reason}") from error


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
        # A row without targets has nothing to learn: an empty response, or no turn of the assistant.
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
    """Return the token ids of a row, closed by EOS, and its labels."""

    def begin(token: int) -> int:
        # Asked for few tokens: the spans of all, as Python objects, would take a quarter more time.
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
