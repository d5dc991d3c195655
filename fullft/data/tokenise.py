"""Tokenising: rows become token ids and labels. What is learned is marked by position, never by id."""

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from datasets import Dataset, Features, List, Value
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from fullft.config.config import Config
from fullft.data.formats import Reader, RowFormat
from fullft.data.micro_batch import IGNORED
from fullft.data.rendered import Rendered, RowError, Span
from fullft.data.rows import Rows, cache_folder
from fullft.data.template import ChatTemplate
from fullft.errors import DataError, FullftError, exhaustion

# Part of the cache's key: raise it whenever this file turns the same rows into other tokens.
_TOKENISING_VERSION = 4
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
        "is_split": Value("bool"),
        "num_kept_out": Value("int32"),
        "num_silent": Value("int32"),
        "num_unmarked": Value("int32"),
        "has_special": Value("bool"),
        "unread_fields": Value("string"),
        "leaves_eos_out": Value("bool"),
    }
)


class TokenisedRows(NamedTuple):
    """Rows of one source: as read, the format that was recognised, and the tokens of what is left of them."""

    rows: Rows
    format: RowFormat
    tokens: Dataset


def tokenise(rows: Rows, row_format: RowFormat, tokenizer: PreTrainedTokenizerBase, config: Config) -> Dataset:
    """Tokenise all rows, or take them from the cache of `datasets`.

    Args:
        rows: as read.
        row_format: renders each row.
        tokenizer: fast, with an EOS token.
        config: `max_length`, `train_on_prompt` and `sanitize_special_tokens` are read.

    Returns:
        The columns of `_TOKENISED`, without rows that have nothing to learn.

    Raises:
        DataError: a row does not hold what its format needs, or says something that would not be trained.
        DiskError: the cache cannot be written.
    """
    # A key of our own: the library's would hash the tokenizer's whole state, which changes as it is used.
    options = (config.max_length, config.train_on_prompt, config.sanitize_special_tokens, row_format.name)
    special_tokens = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    parts = (_TOKENISING_VERSION, rows.key, options, tokenizer.chat_template, special_tokens)
    key = hashlib.sha256(repr(parts).encode() + tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:32]
    reader = Reader(ChatTemplate(tokenizer), config.sanitize_special_tokens)
    folder = cache_folder(key)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return rows.table.map(
            lambda batch, indices: _tokenise_batch(batch, indices, rows, row_format, reader, config),
            batched=True,
            with_indices=True,
            remove_columns=rows.table.column_names,
            features=_TOKENISED,
            new_fingerprint=key,
            cache_file_name=str(folder / "tokenised.arrow"),
            desc="Tokenising",
        )
    except FullftError:
        raise
    except Exception as error:
        raise exhaustion(error) or error from error


def _tokenise_batch(
    batch: dict[str, list[Any]],
    indices: list[int],
    rows: Rows,
    row_format: RowFormat,
    reader: Reader,
    config: Config,
) -> pyarrow.Table:
    rendered = []
    for index, row in zip(indices, rows.decode(batch), strict=True):
        try:
            texts = row_format.render(row, reader)
        except RowError as error:
            raise DataError(f"{rows.place(index)}: {error}") from error
        # A row without targets has nothing to learn: an empty response, or no turn of the assistant.
        rendered += [(index, text) for text in texts if text.targets or config.train_on_prompt]
    tokenizer = reader.template.tokenizer
    pieces, length, is_text = [], config.max_length, row_format.name == "text"
    for index, text, tokens in _encode(rendered, reader):
        ids, labels = _with_labels(text, tokens, tokenizer.eos_token_id, config.train_on_prompt)
        told = (
            text.is_split,
            text.num_kept_out,
            text.num_silent,
            text.num_unmarked,
            _has_special_inside(text, reader.template),
            " ".join(text.unread_fields),
            text.leaves_eos_out,
        )
        for start in range(0, len(ids) if is_text else 1, length):
            piece = slice(start, start + length)
            is_cut = len(ids) > length and not is_text
            pieces.append(_Piece(index, is_cut, ids[piece], labels[piece], *told))
    return _as_table(pieces)


def _has_special_inside(text: Rendered, template: ChatTemplate) -> bool:
    """Return whether special tokens stand in a row's own text; at the ends of a text without a template they may."""
    found = [token.span() for span in text.own for token in template.special_tokens.finditer(text.text, *span)]
    if not text.has_special_tokens:
        begin, end = 0, len(text.text.rstrip())
        while found and found[0][0] == begin:
            begin = found.pop(0)[1]
        while found and found[-1][1] == end:
            end = found.pop()[0]
    return bool(found)


class _Piece(NamedTuple):
    row: int
    truncated: bool
    input_ids: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    is_split: bool
    num_kept_out: int
    num_silent: int
    num_unmarked: int
    has_special: bool
    unread_fields: str
    leaves_eos_out: bool


def _as_table(pieces: Sequence[_Piece]) -> pyarrow.Table:
    """Make the columns of `_TOKENISED`, all rows of one at once: row by row it takes a tenth of tokenising's time."""
    if not pieces:
        return _TOKENISED.arrow_schema.empty_table()
    rows, truncated, all_ids, all_labels, *told = zip(*pieces, strict=True)
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
    } | dict(zip(_Piece._fields[4:], told, strict=True))
    return pyarrow.table(columns, schema=_TOKENISED.arrow_schema).filter(pyarrow.array(num_target_tokens > 0))


class _Tokens(NamedTuple):
    """The tokens of a text.

    Attributes:
        ids: of the vocabulary.
        begin: the character that a token begins in; -1 if the tokenizer added it.
        holding: the token that holds a character, or None.
    """

    ids: list[int]
    begin: Callable[[int], int]
    holding: Callable[[int], int | None]


def _encode(rendered: list[tuple[int, Rendered]], reader: Reader) -> Iterator[tuple[int, Rendered, _Tokens]]:
    """Tokenise texts in few calls, prompt and response together.

    Yields:
        For each row its index, its text and its tokens.
    """
    tokenizer = reader.template.tokenizer
    ends = np.cumsum([len(text.text) for _, text in rendered])
    # A call adds special tokens to all texts or to none; among prompts and completions there may be conversations.
    calls = np.array(ends // _CHARACTERS_PER_CALL * 2 + [text.has_special_tokens for _, text in rendered])
    for group in np.split(np.arange(len(rendered)), np.flatnonzero(np.diff(calls)) + 1):
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
            if reader.sanitizes and text.own:
                yield index, text, _sanitized(text, reader.template)
            else:
                yield index, text, _Tokens(ids, _begins(encoding), encoding.char_to_token)


def _begins(encoding: Encoding) -> Callable[[int], int]:
    def begin(token: int) -> int:
        # Asked for few tokens: the spans of all, as Python objects, would take a quarter more time.
        span = encoding.token_to_chars(token)
        return -1 if span is None else int(span[0])  # none: the tokenizer added it

    return begin


def _sanitized(text: Rendered, template: ChatTemplate) -> _Tokens:
    """Tokenise a text whose own special tokens become plain text, each by itself, as transformers' templates do.

    Source: `sanitize_control_tokens` of transformers' `apply_chat_template`, which gives no places.
    """
    own = [token.span() for span in text.own for token in template.special_tokens.finditer(text.text, *span)]
    ids: list[int] = []
    begins: list[int] = []
    position = 0
    for start, end in [*own, (len(text.text), len(text.text))]:
        for offset, piece in ((position, text.text[position:start]), (start, text.text[start:end])):
            if piece:
                _append_piece(piece, offset, offset == start, template.tokenizer, ids, begins)
        position = end
    if not text.has_special_tokens:
        added = template.tokenizer("", return_attention_mask=False, return_token_type_ids=False)["input_ids"]
        eos = template.tokenizer.eos_token_id
        front = [token for token in added if token != eos]
        ids, begins = front + ids, [-1] * len(front) + begins
    return _Tokens(ids, begins.__getitem__, lambda place: max(bisect_right(begins, place) - 1, 0))


def _append_piece(
    piece: str, offset: int, is_plain: bool, tokenizer: PreTrainedTokenizerBase, ids: list[int], begins: list[int]
) -> None:
    def encode(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = tokenizer(
            text, add_special_tokens=False, split_special_tokens=is_plain, return_offsets_mapping=True, verbose=False
        )
        return encoded["input_ids"], encoded["offset_mapping"]

    # Behind a line end: SentencePiece would put a blank before what begins a text.
    line_end, lead = tokenizer("\n", add_special_tokens=False)["input_ids"], 0
    its_ids, spans = encode(piece)
    if offset:
        behind, spans_behind = encode(f"\n{piece}")
        if behind[: len(line_end)] == line_end:
            its_ids, spans, lead = behind[len(line_end) :], spans_behind[len(line_end) :], 1
    if is_plain and tokenizer.convert_tokens_to_ids(piece) in its_ids:
        raise DataError(f"the tokenizer makes the special token {piece} from plain text too: take it out of the rows")
    ids += its_ids
    begins += [offset + start - lead for start, _ in spans]


def _with_labels(
    text: Rendered, tokens: _Tokens, eos_token_id: int, train_on_prompt: bool
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the token ids of a row, closed by EOS, and its labels."""
    ids, begin, holding = tokens
    first = next((token for token in range(len(ids)) if begin(token) >= 0), len(ids))
    # Beginnings ascend, so that bisection finds a target's tokens, but for those that the tokenizer added around.
    end = next((token for token in range(len(ids), first, -1) if begin(token - 1) >= 0), first)
    # What the tokenizer adds may stand in the text already; each special token stands once.
    skipped = first if 0 < first <= end - first and ids[first : 2 * first] == ids[:first] else 0
    added = len(ids) - end
    is_twice = 0 < added <= end - first and ids[end - added : end] == ids[end:]
    ids = ids[skipped : end if is_twice else len(ids)]
    # The tokenizer may have appended EOS, and rows may end with it.
    has_eos = text.ends_turn or (len(ids) > 1 and ids[-1] == eos_token_id)
    input_ids = np.array(ids if has_eos else [*ids, eos_token_id], dtype=np.int32)
    labels = np.full_like(input_ids, IGNORED)

    def stretch(span: Span) -> slice:
        start, stop = (bisect_left(range(end), place, lo=first, key=begin) for place in span)
        if text.are_marks:
            holds = holding(span[0])
            start = start if holds is None else min(start, holds)
        return slice(start - skipped, stop - skipped)

    for target in [(0, len(text.text))] if train_on_prompt else text.targets:
        learned = stretch(target)
        labels[learned] = input_ids[learned]
    if not text.ends_turn:
        labels[-1] = eos_token_id if text.learns_eos else IGNORED
    for span in text.kept_out:
        labels[stretch(span)] = IGNORED
    return input_ids, labels
