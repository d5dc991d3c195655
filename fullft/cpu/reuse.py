"""Recycling: memory on a CPU that is used again when its tensors are gone.

Owns the memory of large tensors. The system's allocator gives large blocks back at once, and the system clears every
page anew when it is next touched: a tenth of a step of a model of 135M parameters, for its head alone. What is smaller
the allocator is told to keep, from the second micro-batch on and until it keeps too much. Accelerators keep theirs by
themselves.
"""

import ctypes
import functools
import math
import os
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from fullft.cpu.proc import memory_field
from fullft.tracing import is_tracing

_LARGE = 1 << 25  # bytes: what glibc does not keep; its own largest, as more would fragment its heap
_LARGE_AT_FIRST = 1 << 22  # the same until a micro-batch has passed; with less, much is cleared anew within that one
# Of glibc's malloc.h: from which size on memory is given back at once, and from how much of the rest on.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
_OWN_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
_ALIGNMENT = 64  # bytes: a cache line, as torch's own
# The factor by which the process may grow by gaps in the heap. Returning them takes 0.05 s, and the pages that the next
# micro-batch touches are cleared.
_MOST_GROWTH = 1.125
_free: list[np.ndarray[Any, Any]] = []


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Take memory as `torch.empty` does; of a large tensor on a CPU, what an earlier one has left.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
        device: where it is to be.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _LARGE or is_tracing():
        return torch.empty(shape, dtype=dtype, device=device)
    memory = _take(size)
    lease = memory[:size]
    # Torch holds the lease as long as the tensor's storage lives, whoever else has come to share that.
    weakref.finalize(lease, _free.append, memory).atexit = False
    tensor = torch.empty(0, dtype=dtype)
    # No view, as autograd would treat it: it shares the memory alone.
    tensor.set_(torch.from_numpy(lease).view(dtype).view(tuple(shape)))  # type: ignore[call-overload]
    return tensor


def _take(size: int) -> "np.ndarray[Any, Any]":
    """Take the smallest free block that is large enough, or a new one in place of the largest that is not."""
    fitting = [number for number, memory in enumerate(_free) if memory.nbytes >= size]
    if fitting:
        return _free.pop(min(fitting, key=lambda number: _free[number].nbytes))
    if _free:
        _free.pop(max(range(len(_free)), key=lambda number: _free[number].nbytes))
    memory = np.empty(size + _ALIGNMENT, dtype=np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size]


def reuse_memory(model: PreTrainedModel) -> None:
    """Let a model's activations and gradients go where those of earlier micro-batches were.

    On a CPU this changes the whole process's allocator, for good.

    Args:
        model: changed in place, if it is on a CPU.
    """
    if model.device.type == "cpu":
        embeddings = model.get_input_embeddings()
        if (glibc := _glibc()) is not None:
            embeddings.register_forward_pre_hook(_Heap(glibc).before_micro_batch)  # the first module of a micro-batch
        reuse_for_gradient(embeddings)


def _glibc() -> ctypes.CDLL | None:
    """Give the system's allocator, if it is glibc's and nothing in the environment says what it keeps."""
    if sys.platform != "linux" or any(map(os.environ.get, _OWN_SETTINGS)):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") else None  # musl has none


class _Heap:
    """Has glibc keep what a micro-batch frees for the next one, and returns the gaps that the next one cannot fill."""

    def __init__(self, glibc: ctypes.CDLL) -> None:
        """Tell glibc, for the whole process, to keep what is freed; large blocks not before the second micro-batch."""
        glibc.mallopt(_MMAP_THRESHOLD, _LARGE_AT_FIRST)
        glibc.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
        self._glibc = glibc
        self._micro_batches = 0
        self._most = 0.0  # bytes that the process may take
        self._were_returned = False  # gaps, just before the last micro-batch

    def before_micro_batch(self, *_: Any) -> None:
        """Return to the system what is free in the heap, if the process has grown by it.

        What a micro-batch takes after the gaps have gone is what is needed; of those of many lengths, what the largest
        so far has taken.
        """
        if not torch.is_grad_enabled():  # no measure: evaluation takes less
            return
        self._micro_batches += 1
        # The first one is the measured worst step's: among its tensors lie the tracker's records, and the gaps beside
        # those fit no tensor. Whether they came to 0.9 GiB or to none was chance. Nor is it a measure for what follows.
        if self._micro_batches == 2:
            self._glibc.mallopt(_MMAP_THRESHOLD, _LARGE)
            self._were_returned = False
        resident = memory_field("RssAnon") or 0
        if self._were_returned:
            self._most = max(self._most, _MOST_GROWTH * resident)
            self._were_returned = False
        elif resident > self._most:
            self._glibc.malloc_trim(0)
            self._were_returned = True


def reuse_for_gradient(embeddings: nn.Module) -> None:
    """Let the gradient of a table of embeddings, which is as large and nearly all zeros, take recycled memory.

    Args:
        embeddings: changed in place, if they are torch's own, plain ones on a CPU.
    """
    if type(embeddings) is not nn.Embedding or embeddings.weight.device.type != "cpu":
        return
    if embeddings.max_norm is None and not embeddings.scale_grad_by_freq and not embeddings.sparse:
        embeddings.forward = functools.partial(_look_up, embeddings)  # type: ignore[method-assign]


def _look_up(embeddings: nn.Embedding, token_ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = _LookUp.apply(embeddings.weight, token_ids, embeddings.padding_idx)  # type: ignore[no-untyped-call]
    return found


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, token_ids: torch.Tensor, unused: int | None) -> torch.Tensor:  # noqa: D102
        ctx.save_for_backward(token_ids)
        ctx.shape, ctx.unused = weight.shape, unused
        return nn.functional.embedding(token_ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # noqa: D102
        (token_ids,) = ctx.saved_tensors
        total = empty(ctx.shape, gradient.dtype, gradient.device).zero_()
        total.index_add_(0, token_ids.flatten(), gradient.flatten(0, -2))
        if ctx.unused is not None:
            total[ctx.unused] = 0
        return total, None, None
