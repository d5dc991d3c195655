"""Writing so that a crash leaves the old or the new, and never half of either; tensors one at a time.

Owns single writes. Which files there are, and what becomes of them, is `output_dir.py`'s business.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fullft.offload import Array, host_pieces


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary(target: Path) -> Path:
    """Give the hidden name under which a file or folder is written."""
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
    """Give a hidden folder to write into; it is gone afterwards, and with it whatever was not moved out.

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


def write_tensors(file: Path, tensors: Mapping[str, Array], shapes: Mapping[str, Sequence[int]] | None = None) -> str:
    """Write a safetensors file, holding one tensor at a time in host memory.

    `safetensors.torch.save_file` first copies all tensors to the host: for the optimizer states of 7B parameters 56 GB.

    Args:
        file: to write.
        tensors: any shapes, on any device or on disk; memory may be shared between them.
        shapes: under the tensors' names, where they are not their own.

    Returns:
        The sha256 of what was written, in hexadecimal digits.

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
    digest = hashlib.sha256()
    with file.open("wb") as content:
        for part in (len(text).to_bytes(8, "little"), text):
            content.write(part)
            digest.update(part)
        for name in names:
            for piece in host_pieces(tensors[name]):
                data = piece.contiguous().flatten().view(torch.uint8).numpy().data
                content.write(data)
                digest.update(data)
    return digest.hexdigest()
