"""Atomic writes: a crash leaves the old file or the new one, never half of either. Files are hashed here too.

Tensors are the business of `tensors.py`.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fullft.config.ranks import find_place
from fullft.ranks import by_each_rank, by_first_rank, is_first

_HASHED = 1 << 24  # bytes at a time


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary(target: Path) -> Path:
    """Return the hidden name under which a file or folder is written."""
    return target.parent / f".{target.name}.tmp"


def write_text(file: Path, text: str) -> None:
    """Replace a file's whole content at once.

    Args:
        file: may exist.
        text: written in UTF-8.
    """
    with temporary(file).open("w", encoding="utf-8") as content:
        content.write(text)
        content.flush()
        os.fsync(content.fileno())
    os.replace(temporary(file), file)
    sync(file.parent)


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yield a hidden folder for all ranks to write into; afterwards it is deleted, with all that was not moved out.

    The first rank makes and deletes it.

    Args:
        target: what it is written for; not touched.

    Yields:
        The empty folder, on the same disk as the target.
    """
    staging = temporary(target)
    by_first_rank(lambda: _make_anew(staging))
    try:
        yield staging
    finally:
        if is_first():  # without a word to the others, which may have failed elsewhere
            shutil.rmtree(staging, ignore_errors=True)


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def sync_folder(folder: Path) -> None:
    """Wait until a folder and all that is in it are on disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sha256(file: Path) -> str:
    """Return the sha256 of a file, in hexadecimal digits.

    At 1.7 GB/s it takes as long as reading: tensors that one rank writes are hashed on the way.
    """
    digest = hashlib.sha256()
    with file.open("rb") as content:  # read, not mapped: a truncated map ends the process with SIGBUS
        while chunk := content.read(_HASHED):
            digest.update(chunk)
    return digest.hexdigest()


def hash_files(files: Sequence[Path]) -> list[str]:
    """Return the sha256 of files; the ranks share them out among them, and all get all digests.

    Args:
        files: the same on every rank.

    Raises:
        OSError: one cannot be read.
    """
    place = find_place()
    digests = by_each_rank(lambda: [sha256(file) for file in files[place.rank :: place.count]])
    return [digests[number % place.count][number // place.count] for number in range(len(files))]
