"""Data folders: which files are in them, and which split each belongs to.

Splits are told by the card of a data set, else by the names of files and folders; by the rules of
`datasets.load_dataset`.
Source: https://huggingface.co/docs/datasets/repository_structure
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fullft.data.files import ENDINGS, kind_of
from fullft.errors import DataError

_PARQUET = ".parquet"
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# data/<any split>-00000-of-00003.parquet, as data sets are uploaded.
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*\.[^.]+")
# Files that describe a data set, which `load_dataset` does not read either.
_NO_DATA = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
# What a card may say of a config: what is followed, and what changes no rows.
_FOLLOWED = {"config_name", "default", "data_files", "data_dir", "sep", "delimiter"}
_CHANGES_NOTHING = {"version", "description", "features", "drop_labels", "license", "language"}
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
    visible = _visible(folder)
    splits = _splits_of_card(folder) or _splits(folder, _data_among(visible))
    read = {file for files in splits.values() for file in files}
    kinds = sorted({str(_kind(file)) for file in read})
    if len(kinds) != 1:
        raise DataError(f"data folder {folder} must hold files of one kind; found: {', '.join(kinds) or 'none'}")
    left_out = [
        file
        for file in visible
        if file not in read and file.name not in _NO_DATA and file.suffix.lower() not in _DOCUMENTS
    ]
    return DataFiles(splits, kinds[0], tuple(left_out))


def _visible(folder: Path) -> list[Path]:
    """Return the files below a folder, those behind links included, without hidden ones."""
    found: list[Path] = []
    for place, folders, files in os.walk(folder, followlinks=True):
        here = Path(place).resolve()
        folders[:] = [
            # A link back up would never end.
            name
            for name in folders
            if not name.startswith((".", "__")) and not here.is_relative_to((here / name).resolve())
        ]
        found += [Path(place) / name for name in files if not name.startswith(".") and (Path(place) / name).is_file()]
    return sorted(found)


def _data_among(files: list[Path]) -> list[Path]:
    return [file for file in files if _kind(file) is not None and file.name not in _NO_DATA]


# ---------------------------------------------------------------------------------------------- by the card


def _splits_of_card(folder: Path) -> dict[str, list[Path]] | None:
    """Deal files as the card says, `README.md` of a clone from the hub; None if it says nothing of files."""
    card = folder / "README.md"
    configs = _configs(card)
    if not configs:
        return None
    named = [config for config in configs if config.get("default")] or [
        config for config in configs if config["config_name"] == "default"
    ]
    chosen = configs if len(configs) == 1 else named
    if len(chosen) != 1:
        raise DataError(
            f"{card} has the configs {', '.join(str(config['config_name']) for config in configs)}, and not one "
            "default: pass the file or folder of one of them as --dataset"
        )
    config = chosen[0]
    unread = sorted(set(config) - _FOLLOWED - _CHANGES_NOTHING)
    if unread:
        raise DataError(f"{card} says {', '.join(unread)} of its files, which is not followed: pass one as --dataset")
    base = folder / str(config.get("data_dir") or "")
    entries = config.get("data_files")
    if entries is None:
        return _splits(base, _data_among(_visible(base)))
    entries = entries if isinstance(entries, list) else [entries]
    splits: dict[str, list[Path]] = {}
    for entry in entries:
        split, patterns = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        for pattern in patterns if isinstance(patterns, list) else [patterns]:
            splits.setdefault(str(split), []).extend(_matches(base, pattern, card))
    return {split: list(dict.fromkeys(files)) for split, files in splits.items()}


def _configs(card: Path) -> list[dict[str, Any]]:
    """Return the configs that the front matter of a card describes."""
    lines = card.read_text("utf-8-sig", errors="replace").splitlines() if card.is_file() else []
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        return []
    try:
        front = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))
    except yaml.YAMLError as error:
        raise DataError(f"{card}: its front matter is not valid YAML: {' '.join(str(error).split())[:200]}") from error
    configs = front.get("configs") if isinstance(front, dict) else None
    if not configs:
        return []
    if not isinstance(configs, list) or not all(isinstance(each, dict) and "config_name" in each for each in configs):
        raise DataError(f"{card}: `configs` must be a list of objects with a config_name")
    return configs


def _matches(base: Path, pattern: Any, card: Path) -> list[Path]:
    """Return the files that a pattern of a card means; a name with brackets may be a file's own."""
    if isinstance(pattern, str) and (base / pattern).is_file():
        return [base / pattern]
    try:
        # Here `**` is any folder, and there any file below.
        found = sorted(base.glob(f"{pattern}/*" if str(pattern).endswith("**") else pattern))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise DataError(f"{card}: data_files has {pattern!r}, which is no file or pattern in its folder") from error
    files = _data_among([file for file in found if file.is_file() and not _is_hidden(file.relative_to(base), pattern)])
    if not files:
        raise DataError(f"{card}: data_files has {pattern!r}, and there is no such file that can be read")
    return files


def _is_hidden(file: Path, pattern: str) -> bool:
    is_asked_for = any(part.startswith((".", "__")) and part.strip(".") for part in pattern.split("/"))
    return not is_asked_for and (
        file.name.startswith(".") or any(part.startswith((".", "__")) for part in file.parts[:-1] if part != "..")
    )


# ---------------------------------------------------------------------------------------------- by names


def _splits(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Deal files to splits: by shard names, else by folder names, else by file names, else all are `train`."""
    shards: dict[str, list[Path]] = {}
    for file in files:
        shard = _SHARD.fullmatch(file.name)
        if shard is not None and file.parent == folder / "data":
            shards.setdefault(shard[1], []).append(file)
    if shards:
        return {split: shards[split] for split in (*_SPLIT_WORDS, *shards) if split in shards}
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
