"""Sources of rows: hub ids, files and folders become one `datasets.Dataset`.

What cannot be read is named by file and line.
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, Value

from fullft.config.config import Config
from fullft.config.options import COLUMNS
from fullft.errors import DataError, exhaustion

# File ending -> the `datasets` reader and its options.
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {"na_filter": False}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {"sample_by": "document", "encoding": "utf-8-sig"}),
}


def load_rows(config: Config) -> Dataset:
    """Load the rows that the options name, with the columns renamed as they say.

    Args:
        config: `dataset`, `dataset_split`, `columns` and `dataset_text_field` are read.

    Raises:
        DataError: nothing is there, a file cannot be parsed (file and line), or the split or a column is missing.
    """
    # The library logs what it then raises, and our message says the same.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    name = config.dataset
    files = data_files(name)
    rows = _load_files(config, files) if files else _load_from_hub(config)
    if len(rows) == 0:
        raise DataError(f"{name}, split {config.dataset_split}, has no rows")
    if len(rows) == 1 and files and files[0].suffix.lower() in (".json", ".jsonl"):
        _reject_wrapped_rows(rows, files[0])
    return _rename(rows, config)


def data_files(name: str) -> list[Path]:
    """List the local files that a `--dataset` value names; empty for a hub id.

    Args:
        name: a file, a folder of files of one kind (hidden ones are left out), or a hub id.

    Raises:
        DataError: the path has no file that we can read.
    """
    path = Path(name)
    if path.is_file():
        if path.suffix.lower() not in _READERS:
            raise DataError(f"data file {path}: {path.suffix or 'no ending'} is none of {', '.join(_READERS)}")
        return [path]
    if path.is_dir():
        files = sorted(
            file
            for file in path.rglob("*")
            if file.suffix.lower() in _READERS
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        kinds = sorted({_READERS[file.suffix.lower()][0] for file in files})
        if len(kinds) != 1:
            raise DataError(f"data folder {path} must hold files of one kind; found: {', '.join(kinds) or 'none'}")
        return files
    if path.suffix.lower() in _READERS or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError(f"there is no data file or folder {path}")
    return []


# ---------------------------------------------------------------------------------------------- reading


def _load_files(config: Config, files: list[Path]) -> Dataset:
    for file in files:
        if file.stat().st_size == 0:
            raise DataError(f"data file {file} is empty")
    reader, options = _READERS[files[0].suffix.lower()]
    attempts = [options]
    if reader == "json":
        # The reader takes the columns and their types from its first 10 MiB; a key that comes later, or is null
        # until then, fails. Read in one chunk it does not, for the price of memory.
        attempts.append({"chunksize": max(file.stat().st_size for file in files) + 1})
    failures = []
    for attempt in attempts:
        try:
            if reader == "csv":
                attempt = attempt | {"features": _text_columns(files[0])}
            return datasets.load_dataset(
                reader, data_files=[str(file) for file in files], split=config.dataset_split, **attempt
            )
        except Exception as error:
            if (exhausted := exhaustion(error)) is not None:
                raise exhausted from error
            failures.append(error)
            if not failures[1:]:
                require_readable(files)
            if "corresponds to no data" in str(error):
                raise DataError(f"{config.dataset}, split {config.dataset_split}, has no rows") from error
    text = " ".join(str(failures[0].__cause__ or failures[0]).split())
    raise DataError(f"cannot read {config.dataset}, split {config.dataset_split}: {text[:300]}") from failures[0]


def _text_columns(file: Path) -> Features:
    """Declare every named column of a CSV file as text: "007" and "NA" are no numbers."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        return Features({name: Value("string") for name in next(csv.reader(lines), []) if name})


def _load_from_hub(config: Config) -> Dataset:
    name = config.dataset
    try:
        return datasets.load_dataset(name, split=config.dataset_split)
    except ValueError as error:  # an unknown split or configuration: the library names the known ones
        raise DataError(f"data set {name}: {' '.join(str(error).split())[:300]}") from error
    except Exception as error:
        raise exhaustion(error) or _not_found(name) from error


def _not_found(name: str | None) -> DataError:
    return DataError(
        f"data set {name} was found neither as a file or folder, nor in the cache, nor on the hub (network?)\n"
        "pass --dataset <file.jsonl>; a gated data set needs its terms accepted and `hf auth login` first"
    )


def _reject_wrapped_rows(rows: Dataset, file: Path) -> None:
    """Refuse a file such as {"data": [...]}, which the reader takes for one row."""
    for name in set(rows.column_names).difference(COLUMNS):
        value = rows[0][name]
        if isinstance(value, list) and value and isinstance(value[0], dict):
            raise DataError(f"{file} is one object that holds its rows as {name!r}: save that list alone")


def _sources(config: Config) -> dict[str, str]:
    """Map our column names to those of the data."""
    text = {} if config.dataset_text_field == "text" else {"text": config.dataset_text_field}
    return config.columns | text


def _rename(rows: Dataset, config: Config) -> Dataset:
    """Rename all columns at once, so that two may swap names; a column whose name is taken gives way."""
    sources, found = _sources(config), rows.column_names
    for ours, yours in sources.items():
        option = f"--columns {ours}={yours}" if ours in config.columns else f"--dataset_text_field {yours}"
        if yours not in found:
            raise DataError(f"{option}: {config.dataset} has no column {yours}; it has {', '.join(found)}")
        if list(sources.values()).count(yours) > 1:
            raise DataError(f"{option}: the column {yours} is given two names; one column has one role")
    if config.dataset_text_field != "text":
        rows = rows.select_columns([config.dataset_text_field])  # it says that these are rows of text
        return rows.rename_column(config.dataset_text_field, "text")
    rows = rows.remove_columns([ours for ours in sources if ours in found and ours not in sources.values()])
    return rows.rename_columns({yours: ours for ours, yours in sources.items()})


# ---------------------------------------------------------------------------------------------- locating


def require_readable(files: list[Path]) -> None:
    """Look for the first line that cannot be read, since the readers name none.

    Args:
        files: data files.

    Raises:
        DataError: a line is not UTF-8, or not JSON where it should be.
    """
    for file in files:
        if file.suffix.lower() == ".parquet":
            continue
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(f"{file}, line {number}: not UTF-8 text ({error.reason})") from error
        if file.suffix.lower() in (".json", ".jsonl"):
            _require_json(file)


def _require_json(file: Path) -> None:
    documents = _numbered_lines(file) if _has_json_lines(file) else [(1, file.read_text(encoding="utf-8-sig"))]
    for number, text in documents:
        try:
            value = json.loads(text)
            json.dumps(value, ensure_ascii=False).encode()
        except json.JSONDecodeError as error:
            line = number + error.lineno - 1
            raise DataError(f"{file}, line {line}: not valid JSON ({error.msg}, column {error.colno})") from error
        except UnicodeEncodeError as error:
            raise DataError(f"{file}, line {number}: half of a surrogate pair is no character") from error
        if not isinstance(value, dict | list) or (isinstance(value, list) and _has_json_lines(file)):
            raise DataError(f"{file}, line {number}: not a JSON object")


def _has_json_lines(file: Path) -> bool:
    """Return whether a file has one object per line, rather than one document; both endings are used for both."""
    first = next((line for _, line in _numbered_lines(file)), "")
    if first.lstrip().startswith("["):
        return False
    try:
        json.loads(first)
    except json.JSONDecodeError:
        return file.suffix.lower() == ".jsonl"
    return True


def _numbered_lines(file: Path) -> Iterator[tuple[int, str]]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, line.rstrip()


def locate(config: Config, index: int, row: dict[str, Any]) -> str:
    """Name the place of a row, for an error message.

    Args:
        config: the options that loaded it.
        index: its index among the loaded rows.
        row: its content, under our column names; it is searched for, since a split may have skipped rows.
    """
    sources = _sources(config)
    wanted = without_nulls({sources.get(name, name): value for name, value in row.items()})
    for file in data_files(config.dataset):
        for number, candidate in _numbered_rows(file):
            if without_nulls({name: candidate.get(name) for name in wanted}) == wanted:
                return f"{file}, line {number}"
    return f"{config.dataset}, split {config.dataset_split}, row {index + 1}"


def without_nulls(value: Any) -> Any:
    """Leave out null entries: Arrow gives every object the keys of all."""
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value


def _numbered_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read rows with the line that each begins in."""
    if file.suffix.lower() == ".csv":
        csv.field_size_limit(2**31 - 1)
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines)
            begins = 2
            for row in reader:
                yield begins, row
                begins = reader.line_num + 1
    elif file.suffix.lower() in (".json", ".jsonl") and _has_json_lines(file):
        for number, line in _numbered_lines(file):
            yield number, json.loads(line)
    elif file.suffix.lower() in (".json", ".jsonl"):
        yield from _numbered_entries(file.read_text(encoding="utf-8-sig"))


def _numbered_entries(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read the objects of a JSON array with the line that each begins in."""
    decoder, separator = json.JSONDecoder(), re.compile(r"[\s,\[]*")
    number, position = 1, 0
    while True:
        begin = separator.match(text, position).end()  # type: ignore[union-attr]  # it matches the empty string
        if not text.startswith("{", begin):
            return
        number += text.count("\n", position, begin)
        row, end = decoder.raw_decode(text, begin)
        yield number, row
        number += text.count("\n", begin, end)
        position = end
