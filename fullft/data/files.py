"""Data files of text: JSON, CSV and plain text, compressed or not, become rows with the line that each begins in.

They are read here rather than by `datasets`, whose readers take text that looks like a date for one, fill every object
with the keys of all others, shift ragged CSV rows and name no line.
"""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from fullft.errors import DataError


class Record(NamedTuple):
    """A row as it is kept: the line that it begins in, its JSON text, and the names of its columns."""

    line: int
    text: str
    columns: tuple[str, ...]


_COMPRESSED: dict[str, Callable[[Path], Any]] = {".gz": gzip.GzipFile, ".bz2": bz2.BZ2File, ".xz": lzma.LZMAFile}
_JSON, _CSV, _TEXT = (".json", ".jsonl", ".ndjson"), (".csv", ".tsv"), (".txt",)
ENDINGS = (*_JSON, *_CSV, *_TEXT)
# What opening a file in a spreadsheet may put first: it names the delimiter, and is no header.
_SEPARATOR_LINE = re.compile(r"sep=(.)\s*$", re.IGNORECASE)
_BETWEEN = re.compile(r"[ \t\n\r]*")  # JSON's white space
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # half of a pair, escaped


def ending_of(file: Path) -> str:
    """Return the ending that says what is in a file: `.jsonl` for `rows.JSONL.gz`."""
    return (file.with_suffix("") if file.suffix.lower() in _COMPRESSED else file).suffix.lower()


def kind_of(file: Path) -> str | None:
    """Return `json`, `csv` or `text`; None for a file of another kind."""
    kinds = dict.fromkeys(_JSON, "json") | dict.fromkeys(_CSV, "csv") | dict.fromkeys(_TEXT, "text")
    return kinds.get(ending_of(file))


def records(file: Path) -> Iterator[Record]:
    """Read the rows of a file.

    Args:
        file: of a kind that `kind_of` knows.

    Raises:
        DataError: a line is not UTF-8, not JSON, or has other cells than the header; or the file is damaged.
    """
    readers = {"json": _json_records, "csv": _csv_records, "text": _document}
    try:
        yield from readers[str(kind_of(file))](file)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}, line {_first_undecodable_line(file)}: not UTF-8 text ({error.reason})") from error
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"data file {file} is damaged: {error}") from error


def open_bytes(file: Path) -> IO[bytes]:
    """Open a file for reading, decompressed by what its ending says."""
    decompress = _COMPRESSED.get(file.suffix.lower())
    opened: IO[bytes] = file.open("rb") if decompress is None else decompress(file)
    return opened


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Read lines that are not blank, with their numbers."""
    with _open_text(file) as lines:
        for number, line in enumerate(lines, start=1):
            if text := line.rstrip():
                yield number, text


def _open_text(file: Path) -> IO[str]:
    """Open a file of lines; each keeps its end, which is LF, CRLF, or a lone CR as old Macs wrote it."""
    return io.TextIOWrapper(open_bytes(file), encoding="utf-8-sig", newline="")


def _first_undecodable_line(file: Path) -> int:
    with open_bytes(file) as lines:
        for number, line in enumerate(lines.read().splitlines(), start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1


def _whole_text(file: Path) -> str:
    with open_bytes(file) as lines:
        return lines.read().decode("utf-8-sig")


# ---------------------------------------------------------------------------------------------- JSON


def _json_records(file: Path) -> Iterator[Record]:
    if _has_json_lines(file):
        for number, line in _lines(file):
            yield _json_record(file, number, line, must_be_object=True)
    else:
        text = _whole_text(file)
        begin = _skip(text, 0)
        if text.startswith("[", begin):
            yield from _entries(file, text, begin + 1)
        else:
            yield _json_record(file, 1 + text.count("\n", 0, begin), text[begin:].rstrip(), must_be_object=True)


def _has_json_lines(file: Path) -> bool:
    """Return whether a file has one object per line, rather than one document; each ending is used for both."""
    first = next((line for _, line in _lines(file)), "")
    if first.lstrip().startswith("["):
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return ending_of(file) != ".json"
    return True


def _json_record(file: Path, number: int, text: str, must_be_object: bool) -> Record:
    """Read one value, of a text without blanks at its end."""
    value, end = _decode(file, number, text, _skip(text, 0))
    if end < len(text):
        raise _not_json(file, number, text, _skip(text, end), "Extra data")
    return _record(file, number, text, value, must_be_object)


def _decode(file: Path, number: int, text: str, position: int) -> tuple[Any, int]:
    """Decode the JSON value at a position of a text that begins in a line; return it, and where it ends."""
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise _not_json(file, number, text, error.pos, error.msg) from error
    except (ValueError, RecursionError) as error:  # a key twice, a number of 5000 digits, 1000 brackets
        line = number + text.count("\n", 0, position)
        raise DataError(f"{file}, line {line}: {error}") from error


def _not_json(file: Path, number: int, text: str, position: int, what: str) -> DataError:
    line, column = number + text.count("\n", 0, position), position - text.rfind("\n", 0, position)
    return DataError(f"{file}, line {line}: not valid JSON ({what}, column {column})")


def _record(file: Path, number: int, text: str, value: Any, must_be_object: bool) -> Record:
    if isinstance(value, dict):
        columns = tuple(value)
    elif isinstance(value, str) and not must_be_object:
        columns = ("text",)  # a list of texts
    else:
        raise DataError(f"{file}, line {number}: not a JSON object")
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{file}, line {number}: half of a surrogate pair is no character") from error
    return Record(number, text, columns)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):  # JSON does not say which of the two values holds
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is given twice")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _entries(file: Path, text: str, position: int) -> Iterator[Record]:
    """Read the entries of a JSON array, from behind its bracket, with the line that each begins in."""
    line, counted = 1, 0
    position = _skip(text, position)
    is_last = text.startswith("]", position)
    while not is_last:
        line, counted = line + text.count("\n", counted, position), position
        value, end = _decode(file, 1, text, position)
        yield _record(file, line, text[position:end], value, must_be_object=False)
        position = _skip(text, end)
        is_last = text.startswith("]", position)
        if not is_last and not text.startswith(",", position):
            raise _not_json(file, 1, text, position, "Expecting ',' delimiter")
        if not is_last:
            position = _skip(text, position + 1)
    rest = _skip(text, position + 1)
    if rest < len(text):
        raise _not_json(file, 1, text, rest, "Extra data")


def _skip(text: str, position: int) -> int:
    return _BETWEEN.match(text, position).end()  # type: ignore[union-attr]  # it matches the empty string


# ---------------------------------------------------------------------------------------------- CSV, text


def _csv_records(file: Path) -> Iterator[Record]:
    """Read cells as text: "007", "NA" and dates are none of a spreadsheet's types."""
    csv.field_size_limit(2**31 - 1)
    with _open_text(file) as lines:
        skipped, first = 0, ""
        for first in lines:
            if first.strip():
                break
            skipped += 1
        separator_line = _SEPARATOR_LINE.match(first)
        skipped += separator_line is not None
        rest = lines if separator_line else itertools.chain([first], lines)
        delimiter = separator_line[1] if separator_line else _delimiter(first, file)
        # Strict: an open quote would otherwise swallow all that follows.
        reader = csv.reader(rest, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        begins = 1 + skipped
        try:
            for cells in reader:
                number, begins = begins, reader.line_num + 1 + skipped
                if not cells or (not "".join(cells).strip() and (header is None or len(cells) < len(header))):
                    continue  # a blank line
                if header is None:
                    header = _header(file, number, cells)
                    continue
                cells = _fitted(file, number, cells, header)
                row = {name: cell for name, cell in zip(header, cells, strict=True) if name}
                yield Record(number, json.dumps(row, ensure_ascii=False), tuple(row))
        except csv.Error as error:
            raise DataError(f"{file}, line {begins}: not valid CSV ({error})") from error


def _delimiter(header: str, file: Path) -> str:
    """Return what separates cells: a comma (or a tab in `.tsv`), unless only another one makes columns."""
    usual = "\t" if ending_of(file) == ".tsv" else ","

    def columns(delimiter: str) -> int:
        return len(next(csv.reader([header], delimiter=delimiter), []))

    return next((each for each in (usual, ";", "\t", ",") if columns(each) > 1), usual)


def _header(file: Path, number: int, cells: list[str]) -> list[str]:
    while cells and not cells[-1]:  # spreadsheets write commas behind the last column
        cells = cells[:-1]
    twice = next((name for name in cells if name and cells.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{file}, line {number}: two columns are called {twice}")
    return cells


def _fitted(file: Path, number: int, cells: list[str], header: list[str]) -> list[str]:
    """Return one cell per column; empty ones behind the last column do not count."""
    if len(cells) < len(header) or any(cells[len(header) :]):
        count = f"{len(cells)} cell{'' if len(cells) == 1 else 's'}"
        raise DataError(
            f"{file}, line {number}: {count}, and the header has {len(header)}: a text that holds the delimiter or a "
            'quote must stand in quotes ("a, b")'
        )
    return cells[: len(header)]


def _document(file: Path) -> Iterator[Record]:
    """Read a text file, which is one document. Windows' line ends are made plain."""
    text = _whole_text(file).replace("\r\n", "\n").replace("\r", "\n")
    yield Record(1, json.dumps({"text": text}, ensure_ascii=False), ("text",))
