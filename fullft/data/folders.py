"""Data folders: which files are in them, and which split each belongs to.

Splits are told by the names of files and folders, by the rules of `datasets.load_dataset`.
Source: https://huggingface.co/docs/datasets/repository_structure
"""

import re
from dataclasses import dataclass
from pathlib import Path

from fullft.data.files import ENDINGS, kind_of
from fullft.errors import DataError

_PARQUET = ".parquet"
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# data/<any split>-00000-of-00003.parquet, as data sets are uploaded.
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}.*\.[^.]+")
# Files that describe a data set, which `load_dataset` does not read either.
_NO_DATA = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_DOCUMENTS = {"", ".md", ".yaml", ".yml", ".toml", ".py", ".pdf", ".png", ".jpg", ".html", ".lock"}


@dataclass(frozen=True)
class DataFiles:
    """The files of a data set.

    Attributes:
        splits: the files of each split, in order.
        kind: what is in them all: `json`, `csv`, `text` or `parquet`.
        left_out: files of the folder that look like data and are not read.
    """

    splits: dict[str, list[Path]]
    kind: str
    left_out: tuple[Path, ...] = ()


def find_files(name: str) -> DataFiles | None:
    """Find the local files that a data set's name stands for.

    Args:
        name: a file, a folder (hidden files are left out), or a hub id.

    Returns:
        None for what can only be a hub id.

    Raises:
        DataError: the path has no file that can be read.
    """
    path = Path(name)
    if path.is_file():
        kind = _kind(path)
        if kind is None:
            endings = ", ".join((*ENDINGS, _PARQUET))
            raise DataError(
                f"data file {path}: {path.suffix or 'no ending'} is none of {endings}, nor one of the texts with .gz, "
                ".bz2 or .xz behind"
            )
        return DataFiles({"train": [path]}, kind)
    if path.is_dir():
        return _files_of_folder(path)
    if _kind(path) is not None or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError(f"there is no data file or folder {path}")
    return None


def _kind(file: Path) -> str | None:
    return "parquet" if file.suffix.lower() == _PARQUET else kind_of(file)


def _files_of_folder(folder: Path) -> DataFiles:
    visible = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
    )
    data = [file for file in visible if _kind(file) is not None and file.name not in _NO_DATA]
    kinds = sorted({str(_kind(file)) for file in data})
    if len(kinds) != 1:
        raise DataError(f"data folder {folder} must hold files of one kind; found: {', '.join(kinds) or 'none'}")
    splits = _splits(folder, data)
    read = {file for files in splits.values() for file in files}
    left_out = [
        file
        for file in visible
        if file not in read and file.name not in _NO_DATA and file.suffix.lower() not in _DOCUMENTS
    ]
    return DataFiles(splits, kinds[0], tuple(left_out))


def _splits(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Deal files to splits: by shard names, else by folder names, else by file names, else all are `train`."""
    shards: dict[str, list[Path]] = {}
    for file in files:
        shard = _SHARD.fullmatch(file.name)
        if shard is not None and file.parent == folder / "data":
            shards.setdefault(shard[1], []).append(file)
    if shards:
        return shards
    for by_folder in (True, False):
        found = {
            split: [file for file in files if _names(file.relative_to(folder), words, by_folder)]
            for split, words in _SPLIT_WORDS.items()
        }
        in_two = next((file for file in files if sum(file in its_files for its_files in found.values()) > 1), None)
        if in_two is not None:
            names = " and ".join(split for split, its_files in found.items() if in_two in its_files)
            raise DataError(f"{in_two} is of the splits {names} by its path: give each split a folder of its own")
        if any(found.values()):
            return {split: its_files for split, its_files in found.items() if its_files}
    return {"train": files}


def _names(file: Path, words: tuple[str, ...], by_folder: bool) -> bool:
    """Return whether a path names a split: a word of its folders, or of its name, between `-._` blanks or digits."""
    parts = file.parts[:-1] if by_folder else file.parts[-1:]
    word = rf"(^|[-._ 0-9])({'|'.join(words)})" + ("([-._ 0-9]|$)" if by_folder else "[-._ 0-9]")
    return any(re.search(word, part) for part in parts)
