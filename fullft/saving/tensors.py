"""Safetensors files: written with one tensor at a time in host memory, by one rank or by all of them together.

A rank's rows of a tensor are one stretch of a file. So each rank writes its own stretches where they belong, nothing is
gathered, and any number of ranks makes the same file. All ranks must see the same folder.
"""

import errno
import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from fullft.config.ranks import find_place
from fullft.ranks import by_each_rank, by_first_rank, is_first
from fullft.saving.files import hash_files
from fullft.storage.disk import PAGE, aligned_bytes, set_direct
from fullft.storage.tiers import Array, first_element, home_of, host_pieces

_BLOCK = 1 << 24  # bytes written and hashed at a time


@dataclass(frozen=True)
class Stretch:
    """What this rank holds of a tensor: its rows, or all of it.

    Attributes:
        array: the elements, in order, wherever they live.
        shape: of the whole tensor.
        first: the element of the whole tensor, flattened, that the array begins with.
        is_written: whether this rank writes it: of all that hold the same, one does.
    """

    array: Array
    shape: Sequence[int]
    first: int = 0
    is_written: bool = True

    @property
    def num_bytes(self) -> int:
        """The size of the whole tensor."""
        return math.prod(self.shape) * self.array.element_size()


def stretch_of(tensor: torch.Tensor) -> Stretch:
    """Return what this rank holds of a model's parameter or buffer.

    Args:
        tensor: may be sharded, and may have a home elsewhere.
    """
    return Stretch(home_of(tensor), tensor.shape, first_element(tensor), writes(tensor))


def writes(tensor: torch.Tensor) -> bool:
    """Return whether this rank writes its rows: it is the first of those that hold the same ones.

    Args:
        tensor: sharded over the last dimension of its mesh, or whole.
    """
    if not isinstance(tensor, DTensor):
        return is_first()
    mesh = tensor.device_mesh
    return all(mesh.get_local_rank(dim) == 0 for dim in range(mesh.ndim - 1))


def write_tensors(files: Mapping[Path, Mapping[str, Stretch]], is_hashed: bool = True) -> dict[str, str]:
    """Write safetensors files; every rank calls it, and returns when all files are complete and on disk.

    `safetensors.torch.save_file` first copies all tensors to the host: for the optimizer states of 7B parameters 56 GB.

    Args:
        files: the tensors of each file, in any shapes, on any device or on disk; memory may be shared between them.
        is_hashed: whether the sha256 are wanted, which take as long as writing.

    Returns:
        The sha256 of each file, in hexadecimal digits, under its name; empty ones if they are not wanted.

    Raises:
        OSError: the disk is full or cannot be written, on any rank.
    """
    if find_place().count == 1:
        return {file.name: _write_alone(file, stretches, is_hashed) for file, stretches in files.items()}
    headers = {file: _Header.of(stretches) for file, stretches in files.items()}
    by_first_rank(lambda: _create(headers))
    by_each_rank(lambda: _write_mine(files, headers))
    digests = hash_files(list(files)) if is_hashed else [""] * len(files)
    return {file.name: digest for file, digest in zip(files, digests, strict=True)}


# ---------------------------------------------------------------------------------------------- the format

# Source: the safetensors format, https://huggingface.co/docs/safetensors, "Format".
_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}


@dataclass(frozen=True)
class _Header:
    """What a file begins with, the place of each tensor in the file, in order, and the file's size; all in bytes."""

    text: bytes
    places: dict[str, int]
    size: int

    @staticmethod
    def of(stretches: Mapping[str, Stretch]) -> "_Header":
        """Lay the tensors of a file out: by what they are, not by how much of them this rank holds."""
        # The widest first, as safetensors does: each tensor then starts at a multiple of its element size.
        names = sorted(stretches, key=lambda name: (-stretches[name].array.element_size(), name))
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers looks for it
        starts, end = {}, 0
        for name in names:
            starts[name], end = end, end + stretches[name].num_bytes
            dtype, shape = _DTYPES[stretches[name].array.dtype], list(stretches[name].shape)
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [starts[name], end]}
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        text = len(text).to_bytes(8, "little") + text
        return _Header(text, {name: len(text) + start for name, start in starts.items()}, len(text) + end)


# ---------------------------------------------------------------------------------------------- one rank


def _write_alone(file: Path, stretches: Mapping[str, Stretch], is_hashed: bool) -> str:
    """Write a file from its beginning to its end, and hash it on the way."""
    header, digest = _Header.of(stretches), hashlib.sha256()
    head = torch.frombuffer(bytearray(header.text), dtype=torch.uint8)
    pieces = (piece for name in header.places for piece in host_pieces(stretches[name].array))
    with file.open("wb", buffering=0) as content:
        whole = [(0, itertools.chain([head], pieces))]
        _write(content, whole, digest.update if is_hashed else lambda _: None)
    return digest.hexdigest() if is_hashed else ""


# ---------------------------------------------------------------------------------------------- several ranks


def _create(headers: Mapping[Path, _Header]) -> None:
    """Write the headers of files that are as long as they will be."""
    for file, header in headers.items():
        with file.open("wb", buffering=0) as content:
            content.write(header.text)
            content.truncate(header.size)
            os.fsync(content.fileno())
    # A full disk shows at once. Space is not taken yet: where a network file system cannot do that, glibc writes a byte
    # into every block. Source: posix_fallocate(3), its notes on glibc.
    for folder in {file.parent for file in headers}:
        if sum(header.size for header in headers.values()) > shutil.disk_usage(folder).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _write_mine(files: Mapping[Path, Mapping[str, Stretch]], headers: Mapping[Path, _Header]) -> None:
    """Write this rank's stretches of files that are there, each at its place."""
    for file, stretches in files.items():
        mine = [
            (place + stretch.first * stretch.array.element_size(), host_pieces(stretch.array))
            for name, place in headers[file].places.items()
            if (stretch := stretches[name]).is_written and stretch.array.numel()
        ]
        # Not opened for reading too: a network file system would then read what surrounds a stretch, and write it back
        # over what other machines have written there.
        with open(os.open(file, os.O_WRONLY), "wb", buffering=0) as content:
            _write(content, mine, lambda _: None)
            os.fsync(content.fileno())


# ---------------------------------------------------------------------------------------------- bytes


def _write(
    content: FileIO,
    stretches: Iterable[tuple[int, Iterable[torch.Tensor]]],
    digest: Callable[[memoryview], None],
) -> None:
    """Write tensors' bytes to their places; each block is written and hashed while the next one is gathered."""
    with ThreadPoolExecutor(2) as threads:
        under_way: list[Future[None]] = []
        for place, block in _blocks(stretches):
            _finish(under_way)  # its memory is filled next
            under_way = [threads.submit(digest, block), threads.submit(_write_block, content, place, block)]
        _finish(under_way)


def _finish(futures: Iterable[Future[None]]) -> None:
    for future in futures:
        future.result()


def _write_block(content: FileIO, place: int, block: memoryview) -> None:
    """Write whole pages past the page cache, and the rest, or what direct I/O refuses, through it."""
    content.seek(place)
    if place % PAGE == 0 and len(block) >= PAGE:
        set_direct(content, True)
        try:
            block = block[content.write(block[: len(block) // PAGE * PAGE]) :]
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        set_direct(content, False)
    while block:
        block = block[content.write(block) :]


def _blocks(stretches: Iterable[tuple[int, Iterable[torch.Tensor]]]) -> Iterator[tuple[int, memoryview]]:
    """Gather bytes in blocks, in two buffers by turns; but for the first one of a stretch, each starts at a page."""
    block, other = (aligned_bytes(_BLOCK, torch.device("cpu")) for _ in range(2))
    for place, pieces in stretches:
        filled, size = 0, -place % PAGE or _BLOCK
        for piece in pieces:
            data = piece.contiguous().flatten().view(torch.uint8)
            while data.numel():
                count = min(data.numel(), size - filled)
                block[filled : filled + count] = data[:count]
                data, filled = data[count:], filled + count
                if filled == size:
                    yield place, block[:filled].numpy().data
                    block, other, place, filled, size = other, block, place + size, 0, _BLOCK
        if filled:
            yield place, block[:filled].numpy().data
            block, other = other, block
