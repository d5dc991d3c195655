"""Atomic writes: a crash leaves the old file or the new one, never half of either. Tensors are written one at a time.

sha256 runs at 1.7 GB/s, so next to the writing it still costs a third of it on two cores: only manifests ask for it.
"""

import errno
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from fullft.storage.disk import aligned_bytes, set_direct
from fullft.storage.tiers import Array, host_pieces

_BLOCK = 1 << 24  # bytes written and hashed at a time


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
    """Yield a hidden folder to write into; afterwards it is deleted, with all that was not moved out.

    Args:
        target: what it is written for; not touched.

    Yields:
        The empty folder, on the same disk as the target.
    """
    staging = temporary(target)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Wait until a folder and all that is in it are on disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


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


def write_tensors(
    file: Path,
    tensors: Mapping[str, Array],
    shapes: Mapping[str, Sequence[int]] | None = None,
    is_hashed: bool = True,
) -> str:
    """Write a safetensors file, holding one tensor at a time in host memory.

    `safetensors.torch.save_file` first copies all tensors to the host: for the optimizer states of 7B parameters 56 GB.

    Args:
        file: to write.
        tensors: any shapes, on any device or on disk; memory may be shared between them.
        shapes: under the tensors' names, where they are not their own.
        is_hashed: whether the sha256 is wanted, which takes as long as writing.

    Returns:
        The sha256 of the file, in hexadecimal digits; empty if it is not wanted.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    # The widest first, as safetensors does: each tensor then starts at a multiple of its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers looks for it
    end = 0
    for name in names:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        dtype, shape = _DTYPES[tensors[name].dtype], list((shapes or {}).get(name, tensors[name].shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
    pieces = (piece for name in names for piece in host_pieces(tensors[name]))
    digest = hashlib.sha256()
    _write(file, itertools.chain([head], pieces), digest.update if is_hashed else lambda _: None)
    return digest.hexdigest() if is_hashed else ""


def _write(file: Path, pieces: Iterable[torch.Tensor], digest: Callable[[memoryview], None]) -> None:
    """Write tensors' bytes in order; each block is written and hashed while the next one is gathered."""
    with file.open("wb", buffering=0) as content, ThreadPoolExecutor(2) as threads:
        under_way: list[Future[None]] = []
        for block in _blocks(pieces):
            _finish(under_way)  # its memory is filled next
            under_way = [threads.submit(digest, block), threads.submit(_write_block, content, block)]
        _finish(under_way)


def _finish(futures: Iterable[Future[None]]) -> None:
    for future in futures:
        future.result()


def _write_block(content: FileIO, block: memoryview) -> None:
    """Write a block past the page cache, and the rest that direct I/O refuses, such as part of a page, through it."""
    set_direct(content, True)
    try:
        block = block[content.write(block) :]
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    set_direct(content, False)
    while block:
        block = block[content.write(block) :]


def _blocks(pieces: Iterable[torch.Tensor]) -> Iterator[memoryview]:
    """Gather bytes in blocks that start at a page, in two buffers by turns."""
    block, other = (aligned_bytes(_BLOCK, torch.device("cpu")) for _ in range(2))
    filled = 0
    for piece in pieces:
        data = piece.contiguous().flatten().view(torch.uint8)
        while data.numel():
            count = min(data.numel(), _BLOCK - filled)
            block[filled : filled + count] = data[:count]
            data, filled = data[count:], filled + count
            if filled == _BLOCK:
                yield block.numpy().data
                block, other, filled = other, block, 0
    if filled:
        yield block[:filled].numpy().data
