"""Rows: where they come from. Hub ids, files and folders become one `datasets.Dataset`.

Owns finding and reading the data, and naming the file and line of what cannot be read. Knows no row format.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from fullft.config import Config
from fullft.errors import DataError

# File ending -> the `datasets` reader and its options. CSV cells stay text: "007" and "NA" are not numbers.
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {"dtype": str, "keep_default_na": False}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {"sample_by": "document"}),
}


def load_rows(config: Config) -> Dataset:
    """Load the rows that the options name, with the columns renamed as `--columns` says.

    Args:
        config: `dataset`, `dataset_split` and `columns` count.

    Raises:
        DataError: nothing is there, a file cannot be parsed (file and line), or the split or a column is missing.
    """
    name = str(config.dataset)
    files = data_files(name)
    rows = _load_files(config, files) if files else _load_from_hub(config)
    for ours, yours in config.columns.items():
        if yours not in rows.column_names:
            raise DataError(
                f"--columns {ours}={yours}: {name} has no column {yours}; it has {', '.join(rows.column_names)}"
            )
        rows = rows.remove_columns([ours]) if ours in rows.column_names and ours != yours else rows
        rows = rows.rename_column(yours, ours) if ours != yours else rows
    if len(rows) == 0:
        raise DataError(f"{name}, split {config.dataset_split}, has no rows")
    return rows


def data_files(name: str) -> list[Path]:
    """List the local files that a `--dataset` value names; empty for a hub id.

    Args:
        name: a file, a folder of files of one kind, or a hub id.

    Raises:
        DataError: the path has no file that we can read.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() not in _READERS:
            raise DataError(f"data file {path}: {path.suffix or 'no ending'} is none of {', '.join(_READERS)}")
        return [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _READERS and file.is_file())
        kinds = sorted({_READERS[file.suffix.lower()][0] for file in files})
        if len(kinds) != 1:
            raise DataError(f"data folder {path} must hold files of one kind; found: {', '.join(kinds) or 'none'}")
        return files
    if path.suffix.lower() in _READERS or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError(f"there is no data file or folder {path}")
    return []


def _load_files(config: Config, files: list[Path]) -> Dataset:
    for file in files:
        if file.stat().st_size == 0:
            raise DataError(f"data file {file} is empty")
    reader, options = _READERS[files[0].suffix.lower()]
    try:
        return datasets.load_dataset(
            reader, data_files=[str(file) for file in files], split=config.dataset_split, **options
        )
    except Exception as error:
        for file in files:
            _find_broken_line(file)
        text = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"cannot read {config.dataset}, split {config.dataset_split}: {text[:300]}") from error


def _load_from_hub(config: Config) -> Dataset:
    name = config.dataset
    try:
        return datasets.load_dataset(name, split=config.dataset_split)
    except ValueError as error:  # an unknown split or configuration: the library names the known ones
        raise DataError(f"data set {name}: {' '.join(str(error).split())[:300]}") from error
    except Exception as error:
        raise DataError(
            f"data set {name} was found neither as a file or folder, nor in the cache, nor on the hub (network?)\n"
            f"pass --dataset <file.jsonl>; a gated data set needs its terms accepted and `hf auth login` first"
        ) from error


# ---------------------------------------------------------------------------------------------- locating


def _find_broken_line(file: Path) -> None:
    """Raise a DataError that names the first line that is not JSON, since the reader names none."""
    try:
        if file.suffix.lower() == ".jsonl":
            for number, line in _numbered_lines(file):
                if not isinstance(json.loads(line), dict):
                    raise DataError(f"{file}, line {number}: not a JSON object")
        elif file.suffix.lower() == ".json":
            number = 1
            json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: {error}") from error
    except json.JSONDecodeError as error:
        line_number = number if file.suffix.lower() == ".jsonl" else error.lineno
        raise DataError(f"{file}, line {line_number}: not valid JSON ({error.msg}, column {error.colno})") from error


def _numbered_lines(file: Path) -> Iterator[tuple[int, str]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, line


def locate(config: Config, index: int, row: dict[str, Any]) -> str:
    """Say where a row stands, for an error message.

    Args:
        config: the options that loaded it.
        index: its index among the loaded rows.
        row: its content, under our column names; it is searched for, since a split may have skipped rows.
    """
    wanted = {config.columns.get(name, name): value for name, value in row.items() if value is not None}
    for file in data_files(str(config.dataset)):
        for number, candidate in _numbered_rows(file):
            if all(candidate.get(name) == value for name, value in wanted.items()):
                return f"{file}, line {number}"
    return f"{config.dataset}, row {index + 1}"


def _numbered_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if file.suffix.lower() == ".jsonl":
        for number, line in _numbered_lines(file):
            yield number, json.loads(line)
    elif file.suffix.lower() == ".csv":
        with file.open(encoding="utf-8", newline="") as lines:
            reader = csv.DictReader(lines)
            for row in reader:
                yield reader.line_num, row
