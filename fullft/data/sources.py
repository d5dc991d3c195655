"""Sources of rows: hub ids, files, folders and saved data sets become rows of one split."""

import glob
import hashlib
import itertools
import json
import os
from functools import lru_cache
from pathlib import Path

import datasets
import pyarrow
import pyarrow.compute
from datasets import Dataset, DatasetDict, ReadInstruction

from fullft.config.config import Config
from fullft.config.options import COLUMNS as OUR_COLUMNS
from fullft.data.files import records
from fullft.data.folders import DataFiles, find_files
from fullft.data.rows import COLUMNS, FILE, LINE, TEXT, Rows, cache_folder, rename
from fullft.errors import DataError, exhaustion

# Part of the cache's key: raise it whenever the same file is read as other rows.
_READING_VERSION = 1
_SCHEMA = pyarrow.schema(
    {FILE: pyarrow.string(), LINE: pyarrow.int64(), COLUMNS: pyarrow.string(), TEXT: pyarrow.large_string()}
)
_ROWS_PER_WRITE = 10_000
_POINTER = b"version https://git-lfs.github.com/spec/"  # how a file begins that a clone without Git LFS has


def load_rows(config: Config) -> Rows:
    """Load the rows that the options name, with the columns renamed as they say.

    Args:
        config: `dataset`, `dataset_split`, `columns` and `dataset_text_field` are read.

    Raises:
        DataError: nothing is there, a file cannot be parsed (file and line), or the split or a column is missing.
        DiskError: the cache cannot be written.
    """
    return _load(config.dataset, config.dataset_split, config)


def load_held_out_rows(config: Config) -> Rows | None:
    """Load the rows of `eval_dataset` and `eval_split`; None where the options name neither.

    Args:
        config: these two are read, and what `load_rows` reads.

    Raises:
        DataError: as from `load_rows`; or several splits could be meant.
        DiskError: the cache cannot be written.
    """
    if config.eval_dataset is None and config.eval_split is None:
        return None
    name = config.eval_dataset or config.dataset
    return _load(name, config.eval_split or _only_split(name), config)


def _only_split(name: str) -> str:
    """Return the split of a data set that has one."""
    if (saved := _saved(name)) is not None:
        splits = list(saved) if isinstance(saved, DatasetDict) else ["train"]
    elif (files := find_files(name)) is not None:
        splits = list(files.splits)
    else:
        try:
            splits = datasets.get_dataset_split_names(name)
        except Exception as error:
            raise exhaustion(error) or _not_found(name) from error
    if len(splits) > 1:
        raise DataError(f"eval_dataset {name} has the splits {', '.join(splits)}: name one with --eval_split")
    return splits[0]


def _load(name: str, split: str, config: Config) -> Rows:
    # The library logs what it then raises, and our message says the same.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    files: DataFiles | None = None
    if (saved := _saved(name)) is not None:
        tables = saved if isinstance(saved, DatasetDict) else {"train": saved}
        table = _select(name, split, tables, {each: len(tables[each]) for each in tables})
    elif (files := find_files(name)) is not None:
        tables = {each: _read(files, each) for each in files.splits if each in _names_in(split)}
        table = _select(name, split, tables, {each: len(tables.get(each, ())) for each in files.splits})
    else:
        table = _load_from_hub(name, split)
    is_text = files is not None and files.kind != "parquet"
    columns = _columns_of(table) if is_text else table.column_names
    if len(table) == 0 or not columns:
        raise DataError(f"{name}, split {split}, has no rows")
    try:
        renamed = rename(columns, name, config.columns, config.dataset_text_field)
    except ValueError as error:
        raise DataError(str(error)) from error
    left_out = tuple(map(str, files.left_out)) if files is not None else ()
    rows = Rows(name, split, table, renamed, is_text, left_out)
    if is_text and len(rows) == 1:
        _reject_wrapped_rows(rows)
    return rows


def _names_in(split: str) -> set[str]:
    """Return the names of the splits in a description such as `train[:10]+validation`."""
    return {part.split("[")[0].strip() for part in split.split("+")}


def _select(name: str, split: str, tables: dict[str, Dataset], lengths: dict[str, int]) -> Dataset:
    """Take the rows that a description such as `train[:10]+validation` means."""
    try:
        instructions = ReadInstruction.from_spec(split).to_absolute(lengths)
    except ValueError as error:
        raise DataError(f"{name}, split {split}: {' '.join(str(error).split())[:300]}") from error
    parts = [
        tables[each.splitname].select(range(each.from_, each.to) if each.from_ < each.to else [])
        for each in instructions
    ]
    try:
        return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    except ValueError as error:
        raise DataError(f"{name}: the splits of {split} have columns of other types: train on one of them") from error


def _reject_wrapped_rows(rows: Rows) -> None:
    """Refuse a file such as {"data": [...]}, which is one row."""
    if set(OUR_COLUMNS).intersection(rows.column_names):
        return
    for name, value in rows[0].items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            file = rows.table[0][FILE]
            raise DataError(f"{file} is one object that holds its rows as {name!r}: save that list alone")


# ---------------------------------------------------------------------------------------------- reading


def _read(files: DataFiles, split: str) -> Dataset:
    paths = files.splits[split]
    for path in paths:
        if path.stat().st_size == 0:
            raise DataError(f"data file {path} is empty")
        if _is_pointer(path):
            raise DataError(f"data file {path} stands for one that Git LFS has not fetched: run `git lfs pull` there")
    if files.kind != "parquet":
        return _read_text(paths)
    try:
        return datasets.load_dataset("parquet", data_files=[glob.escape(str(path)) for path in paths], split="train")
    except Exception as error:
        text = " ".join(str(error.__cause__ or error).split())
        raise exhaustion(error) or DataError(f"cannot read {', '.join(map(str, paths))}: {text[:300]}") from error


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def _read_text(paths: list[Path]) -> Dataset:
    """Read files into a table on disk, next to those of `datasets`, or take it from there."""
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    names = list(map(str, paths))
    key = hashlib.sha256(repr((_READING_VERSION, names, states)).encode()).hexdigest()[:32]
    folder = cache_folder(key)
    target, partial = folder / "rows.arrow", folder / f"rows-{os.getpid()}.partial"
    if not target.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Not a file of pyarrow's, whose errors do not say which file.
            with partial.open("wb") as sink, pyarrow.ipc.new_stream(sink, _SCHEMA) as writer:
                for path in paths:
                    _write_rows(path, writer)
            partial.replace(target)
        except OSError as error:
            raise exhaustion(error) or error from error
        finally:
            if folder.is_dir():
                partial.unlink(missing_ok=True)
    return Dataset(datasets.table.MemoryMappedTable.from_file(str(target)), fingerprint=key)


def _write_rows(path: Path, writer: pyarrow.ipc.RecordBatchStreamWriter) -> None:
    rows = records(path)
    while True:
        try:
            some = list(itertools.islice(rows, _ROWS_PER_WRITE))
        except OSError as error:  # of the file, not of the cache
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error
        if not some:
            return
        lines, texts, columns = zip(*((each.line, each.text, _as_json(each.columns)) for each in some), strict=True)
        values = ([str(path)] * len(some), lines, columns, texts)
        writer.write_batch(pyarrow.record_batch(list(map(pyarrow.array, values, _SCHEMA.types)), schema=_SCHEMA))


@lru_cache
def _as_json(columns: tuple[str, ...]) -> str:
    return json.dumps(columns)


def _columns_of(table: Dataset) -> list[str]:
    """Return the columns of all rows, as they first come."""
    kinds = pyarrow.compute.unique(table.with_format("arrow")[:][COLUMNS]) if len(table) else []
    return list(dict.fromkeys(name for kind in kinds for name in json.loads(kind.as_py())))


def _saved(name: str) -> Dataset | DatasetDict | None:
    """Load what `save_to_disk` has written; None if the folder is none of its."""
    folder = Path(name)
    if not any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
        return None
    try:
        return datasets.load_from_disk(name)
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise exhaustion(error) or DataError(f"cannot read the saved data set {folder}: {text}") from error


def _load_from_hub(name: str, split: str) -> Dataset:
    try:
        return datasets.load_dataset(name, split=split)
    except ValueError as error:  # an unknown split or configuration: the library names the known ones
        raise exhaustion(error) or DataError(f"data set {name}: {' '.join(str(error).split())[:300]}") from error
    except Exception as error:
        raise exhaustion(error) or _not_found(name) from error


def _not_found(name: str | None) -> DataError:
    return DataError(
        f"data set {name} was found neither as a file or folder, nor in the cache, nor on the hub (network?)\n"
        "pass --dataset <file.jsonl>; a gated data set needs its terms accepted and `hf auth login` first"
    )
