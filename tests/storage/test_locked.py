"""Locked memory takes its exact size where CUDA registers what exists, and torch's blocks where it refuses."""

import gc
import math
import mmap
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fullft.storage import locked

PAGE = mmap.PAGESIZE


class Runtime:
    """Stands for CUDA's runtime library; it refuses to lock more than `limit` bytes at a time."""

    def __init__(self, limit: int) -> None:
        self.limit, self.waits = limit, 0
        self.held: dict[int, int] = {}

    def register(self, address: int, size: int, flags: int) -> int:
        assert address % PAGE == size % PAGE == flags == 0
        if size > self.limit:
            return 2
        self.held[address] = size
        return 0

    def unregister(self, address: int) -> int:
        del self.held[address]
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    runtime = Runtime(limit=1 << 30)
    functions = SimpleNamespace(cudaHostRegister=runtime.register, cudaHostUnregister=runtime.unregister)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: functions)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: setattr(runtime, "waits", runtime.waits + 1))
    monkeypatch.setattr(locked, "_held", {"bytes": 0, "peak": 0})
    locked.can_register.cache_clear()
    yield runtime
    gc.collect()
    locked.can_register.cache_clear()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """What is asked of torch's own allocators, which a CPU build does not have: bytes, and where."""
    requests, zeros = [], torch.zeros

    def made(*shape: int, pin_memory: bool = False, device: str = "cpu", **options: Any) -> torch.Tensor:
        requests.append((math.prod(shape), "locked" if pin_memory else device))
        return zeros(*shape, **options)

    monkeypatch.setattr(torch, "zeros", made)
    return requests


@pytest.mark.parametrize("size", [1, PAGE, PAGE + 1, 5 * PAGE + 3])
def test_memory_takes_whole_pages_until_it_is_freed(size: int, runtime: Runtime, asked: list[tuple[int, str]]) -> None:
    memory = locked.locked_zeros(size)
    taken = -(-size // PAGE) * PAGE
    assert memory.numel() == size and not memory.any() and memory.data_ptr() % PAGE == 0
    assert sum(runtime.held.values()) == memory.untyped_storage().nbytes() == locked.locked_bytes(size) == taken
    view = memory[size // 2 :]
    del memory
    assert sum(runtime.held.values()) == taken  # a part of it is still in use
    before = runtime.waits
    del view
    assert not runtime.held and runtime.waits == before + 1  # copies from it may have been under way
    assert locked.peak_registered_bytes() == taken and asked == []


def test_no_bytes_are_not_locked(runtime: Runtime) -> None:
    assert locked.locked_zeros(0).numel() == locked.locked_bytes(0) == 0 and not runtime.held


def test_refused_memory_is_torch_s_own(runtime: Runtime, asked: list[tuple[int, str]]) -> None:
    """The error stays for the next kernel, so one is run that nobody needs."""
    runtime.limit = 2 * PAGE
    assert locked.locked_zeros(2 * PAGE).numel() == 2 * PAGE and asked == []
    assert locked.locked_zeros(3 * PAGE).numel() == 3 * PAGE
    assert asked == [(1, "cuda"), (4 * PAGE, "locked")] and not runtime.held


def test_plan_counts_blocks_where_cuda_refuses(runtime: Runtime, asked: list[tuple[int, str]]) -> None:
    assert locked.locked_bytes(3 * PAGE) == 3 * PAGE
    runtime.limit = 0
    locked.can_register.cache_clear()
    assert locked.locked_bytes(3 * PAGE) == 4 * PAGE
    assert locked.locked_zeros(3 * PAGE).numel() == 3 * PAGE
    assert asked == [(1, "cuda"), (4 * PAGE, "locked")]  # it is tried once


def test_machine_without_cuda_plans_exact_sizes() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    locked.can_register.cache_clear()
    assert locked.locked_bytes(3 * PAGE + 1) == 4 * PAGE and locked.locked_bytes(5 * PAGE) == 5 * PAGE


@pytest.mark.parametrize(("size", "block"), [(0, 0), (1, 1), (2, 2), (3, 4), (4096, 4096), (4097, 8192)])
def test_blocks_are_powers_of_two(size: int, block: int) -> None:
    assert locked.block_bytes(size) == block
