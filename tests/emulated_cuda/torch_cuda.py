"""What torch.cuda lacks in a CPU build: functions that ask the device, and answers that a card would give."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from emulated_cuda.library import call, figure


class Properties:
    """Of the card that this one stands for, in the fields that torch's own have."""

    name = "NVIDIA A100 (emulated)"
    major, minor = 8, 0
    multi_processor_count = 108
    warp_size = 32
    regs_per_multiprocessor = 65536
    max_threads_per_multi_processor = 2048
    shared_memory_per_block = 48 << 10
    L2_cache_size = 40 << 20
    gcnArchName = ""

    @property
    def total_memory(self) -> int:
        return _total


class Runtime:
    """The part of CUDA's runtime library that locks memory which exists."""

    class cudaError:
        success = 0

    @staticmethod
    def cudaHostRegister(address: int, size: int, flags: int) -> int:
        call("pin", address, size)
        return 0

    @staticmethod
    def cudaHostUnregister(address: int) -> int:
        call("unpin", address)
        return 0

    @staticmethod
    def cudaMemGetInfo(device: int) -> tuple[int, int]:
        return _memory_left(device)

    @staticmethod
    def cudaGetErrorString(error: int) -> str:
        return "no error"


class OnDevice:
    """`torch.cuda.device`: there is only one."""

    def __init__(self, device: Any = None) -> None:
        pass

    def __enter__(self) -> "OnDevice":
        return self

    def __exit__(self, *_: object) -> None:
        pass


_total = 0


def _memory_left(device: Any = None) -> tuple[int, int]:
    return figure("limit") - figure("reserved"), _total


def _limit_memory(fraction: float, device: Any = None) -> None:
    call("set_limit", int(fraction * _total))


def _host_memory() -> dict[str, int]:
    names = {"active_bytes": "pinned", "allocated_bytes": "pinned_held"}
    current = {f"{name}.current": figure(ours) for name, ours in names.items()}
    return current | {f"{name}.peak": figure(f"{ours}_peak") for name, ours in names.items()}


def _device_memory(device: Any = None) -> dict[str, int]:
    names = {f"{name}_bytes.all": name for name in ("requested", "allocated", "reserved")}
    current = {f"{name}.current": figure(ours) for name, ours in names.items()}
    return current | {f"{name}.peak": figure(f"{ours}_peak") for name, ours in names.items()}


def complete() -> None:
    """Give torch.cuda what it lacks."""
    global _total
    _total = figure("limit")
    cuda = torch.cuda
    of_library = {
        "_cuda_getDeviceCount": lambda: 1,
        "_cuda_getDevice": lambda: 0,
        "_cuda_getCurrentRawStream": lambda device: 0,
        "_cuda_isInBadFork": lambda: False,
        "_is_flash_attention_available": lambda: True,  # for packed rows; see `tests/flash_attention.py`
    }
    of_device = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "device": OnDevice,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: Properties.name,
        "get_device_capability": lambda device=None: (Properties.major, Properties.minor),
        "get_device_properties": lambda device=None: Properties(),
        "is_bf16_supported": lambda including_emulation=True: True,
        "cudart": lambda: Runtime,
        "synchronize": lambda device=None: torch.accelerator.synchronize(),
        "current_stream": lambda device=None: torch.accelerator.current_stream(),
        "is_current_stream_capturing": lambda: False,
    }
    of_memory = {
        "mem_get_info": _memory_left,
        "memory_allocated": lambda device=None: figure("allocated"),
        "max_memory_allocated": lambda device=None: figure("allocated_peak"),
        "memory_reserved": lambda device=None: figure("reserved"),
        "max_memory_reserved": lambda device=None: figure("reserved_peak"),
        "memory_stats": _device_memory,
        "reset_peak_memory_stats": lambda device=None: call("reset_peaks"),
        "host_memory_stats": _host_memory,
        "empty_cache": lambda: call("empty_cache"),
        "set_per_process_memory_fraction": _limit_memory,
    }
    for name, function in of_library.items():
        setattr(torch._C, name, function)
    for name, function in (of_device | of_memory).items():
        setattr(cuda, name, function)
    cuda._initialized = True
    cuda.memory._record_memory_history = lambda *_, **__: None
    cuda.memory._dump_snapshot = lambda file: Path(file).write_bytes(b"")
    cuda.default_generators = (torch.Generator("cuda"),)
    torch.accelerator.is_available = lambda: True


@contextlib.contextmanager
def limited(num_bytes: int) -> Iterator[None]:
    """Give the device less memory within the body.

    Args:
        num_bytes: that it may reserve in all.
    """
    before = figure("limit")
    call("set_limit", num_bytes)
    try:
        yield
    finally:
        call("set_limit", before)
