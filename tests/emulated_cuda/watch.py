"""What goes past torch's operators: bytes between pinned memory and files, and the kernels of bitsandbytes.

bitsandbytes' own Python code runs. Of its library, what stands here are the two functions that training calls.
"""

import ctypes
import importlib.util
import os
import weakref
from math import prod
from typing import Any

import torch

from emulated_cuda.library import call

_PAGE = 4096
_BLOCK = 256  # elements that share one scale

_managed: "list[weakref.ref[torch.Tensor]]" = []


def watch_files() -> None:
    """Tell the race detector of what is read into pinned memory and written from it."""
    from fullft.storage.disk import DiskFile

    transfer = DiskFile.transfer

    def transferred(self: DiskFile, operation: Any, offset: int, memory: torch.Tensor) -> None:
        is_read = operation is os.preadv
        call(
            "touch_on_host", memory.data_ptr(), memory.nbytes, int(is_read), b"a file's " + operation.__name__.encode()
        )
        transfer(self, operation, offset, memory)

    DiskFile.transfer = transferred  # type: ignore[method-assign]


# ---------------------------------------------------------------------------------------------- bitsandbytes


def stand_in_for_bitsandbytes() -> None:
    """Put what computes 8-bit steps and makes paged memory in the place of bitsandbytes' library."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return
    import bitsandbytes.backends.cuda.ops as kernels
    import bitsandbytes.functional as functional

    kernels.str2optimizer8bit_blockwise["adam"] = (_adam_8bit,) * 3
    functional.get_paged = _paged


def _paged(*shape: int, dtype: torch.dtype = torch.float32, device: Any = None) -> torch.Tensor:
    """Make managed memory as `get_paged` does: a tensor that torch takes for the CPU's, with a mark."""
    memory = torch.empty(prod(shape) * dtype.itemsize + _PAGE, dtype=torch.uint8)
    start = -memory.data_ptr() % _PAGE
    tensor = memory[start : start + prod(shape) * dtype.itemsize].view(dtype).view(shape)
    _managed.append(weakref.ref(tensor))
    tensor.is_paged, tensor.page_deviceid = True, 0  # type: ignore[attr-defined]
    return tensor


def managed_bytes() -> int:
    """Return the bytes of managed memory in use, which no allocator of torch's counts."""
    tensors = [tensor for reference in _managed if (tensor := reference()) is not None]
    _managed[:] = map(weakref.ref, tensors)
    return sum(tensor.nbytes for tensor in tensors)


def _adam_8bit(*arguments: Any) -> None:
    """Take the step of `cadam_8bit_blockwise_grad_fp32` on the addresses that it gets."""
    pointers, numbers = _split(arguments)
    weights, gradient, codes1, codes2, book1, book2, absmax1, absmax2 = pointers
    beta1, beta2, _, _, eps, step, rate, decay, _, _, count = numbers
    blocks = -(-count // _BLOCK)
    call("launch", b"bitsandbytes' 8-bit Adam")
    w, g = (_at(address, count, torch.float32, write) for address, write in ((weights, True), (gradient, False)))
    codes = [_at(address, count, torch.uint8, True) for address in (codes1, codes2)]
    scales = [_at(address, blocks, torch.float32, True) for address in (absmax1, absmax2)]
    books = [_at(address, 256, torch.float32, False) for address in (book1, book2)]
    each = torch.arange(count) // _BLOCK
    mean, square = (book[code.int()] * scale[each] for book, code, scale in zip(books, codes, scales, strict=True))
    mean.mul_(beta1).add_(g, alpha=1 - beta1)
    square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    correction1, correction2 = 1 - beta1**step, (1 - beta2**step) ** 0.5
    w.sub_(rate / correction1 * mean / (square.sqrt() / correction2 + eps)).mul_(1 - rate * decay)
    for moment, code, scale, book in zip((mean, square), codes, scales, books, strict=True):
        scale.zero_().scatter_reduce_(0, each, moment.abs(), "amax")
        between = (book[:-1] + book[1:]) / 2
        code.copy_(torch.bucketize(moment / scale[each].clamp(min=1e-38), between))


def _split(arguments: tuple[Any, ...]) -> tuple[list[int], list[Any]]:
    """Return the addresses among a C function's arguments, and the numbers."""
    pointers = [each.value for each in arguments if isinstance(each, ctypes.c_void_p)]
    return pointers, [each.value for each in arguments if not isinstance(each, ctypes.c_void_p)]


def _at(address: int, count: int, dtype: torch.dtype, is_written: bool) -> torch.Tensor:
    """View memory of the device, and note the access."""
    size = count * dtype.itemsize
    call("touch_on_stream", address, size, int(is_written), b"bitsandbytes' 8-bit Adam")
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype)
