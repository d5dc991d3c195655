"""Locked memory of the host: it stays in place, so that a CUDA device copies it by itself.

torch's own allocator locks blocks of powers of two: 107 GiB for the 94 GiB that Mistral-7B keeps on the host. What
lives as long as a run is therefore locked here in its exact size. Buffers that come and go are torch's, which keeps
blocks for reuse: locking memory takes longer than copying it.
"""

import functools
import mmap
import weakref
from contextlib import suppress
from typing import Any

import numpy as np
import torch

_PAGE = mmap.PAGESIZE  # bytes; memory is locked in whole pages of the system
_held = {"bytes": 0, "peak": 0}


def locked_zeros(num_bytes: int) -> torch.Tensor:
    """Allocate zeroed memory that is locked for CUDA: [num_bytes] uint8, from the start of a page.

    Where CUDA refuses to lock memory that exists, it is torch's own.

    Args:
        num_bytes: its size; `locked_bytes` says what it takes.
    """
    if num_bytes == 0:
        return torch.zeros(0, dtype=torch.uint8)
    if not can_register() or (memory := _registered(_in_pages(num_bytes))) is None:
        return torch.zeros(block_bytes(num_bytes), dtype=torch.uint8, pin_memory=True)[:num_bytes]
    return memory[:num_bytes]


def locked_bytes(num_bytes: int) -> int:
    """Return what `locked_zeros` takes: on this machine, or on another one with CUDA if this one has none.

    Args:
        num_bytes: that are asked for.
    """
    return _in_pages(num_bytes) if can_register() else block_bytes(num_bytes)


def locked_block(num_bytes: int) -> torch.Tensor:
    """Take uninitialised locked memory from torch, for data on its way: [num_bytes] uint8, from the start of a page.

    Args:
        num_bytes: its size; `block_bytes` says what it takes.
    """
    return torch.empty(block_bytes(num_bytes), dtype=torch.uint8, pin_memory=True)[:num_bytes]


def block_bytes(num_bytes: int) -> int:
    """Return the size of the block that torch's allocator of locked memory takes: the next power of two.

    Args:
        num_bytes: that are asked for.
    """
    return 1 << (num_bytes - 1).bit_length() if num_bytes else 0


def peak_registered_bytes() -> int:
    """Return the most memory that was locked here at a time; torch does not count it."""
    return _held["peak"]


@functools.cache
def can_register() -> bool:
    """Return whether CUDA locks memory that exists, as it does nearly everywhere; tried once, with a page."""
    if not torch.cuda.is_available():
        return True
    _whole, memory = _whole_pages(_PAGE)
    return _register(memory) and int(torch.cuda.cudart().cudaHostUnregister(memory.ctypes.data)) == 0


def _in_pages(num_bytes: int) -> int:
    return -(-num_bytes // _PAGE) * _PAGE


def _registered(size: int) -> torch.Tensor | None:
    whole, memory = _whole_pages(size)
    tensor = torch.from_numpy(memory).zero_()  # by all threads: CUDA would ask the system for the pages one by one
    if not _register(memory):
        return None
    _held["bytes"] += size
    _held["peak"] = max(_held.values())
    # torch holds these pages as long as the tensor's storage lives, whatever else shares it.
    weakref.finalize(memory, _unregister, whole, memory.ctypes.data, size, torch.cuda.current_device()).atexit = False
    return tensor


def _whole_pages(size: int) -> "tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]":
    """Allocate uninitialised memory; return it, and the part of it that starts at a page."""
    whole = np.empty(size + _PAGE, dtype=np.uint8)
    start = -whole.ctypes.data % _PAGE
    return whole, whole[start : start + size]


def _register(memory: "np.ndarray[Any, Any]") -> bool:
    """Lock whole pages, and return whether CUDA does."""
    if int(torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)) == 0:
        return True
    with suppress(RuntimeError):  # the error is left for the next kernel, which would raise it
        torch.zeros(1, device="cuda")
    return False


def _unregister(whole: "np.ndarray[Any, Any]", address: int, size: int, device: int) -> None:
    """Unlock memory, which is freed when this returns. torch knows nothing of copies that are under way from it."""
    torch.cuda.synchronize(device)  # whichever thread drops it last: each begins with the first device
    torch.cuda.cudart().cudaHostUnregister(address)
    _held["bytes"] -= size
