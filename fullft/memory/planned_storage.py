"""Storage for a plan: arrays that have sizes but no bytes, and nothing that moves."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from fullft.storage.disk import PAGE, DiskFile
from fullft.storage.locked import locked_block, locked_bytes
from fullft.storage.tiers import Storage
from fullft.storage.workers import Workers
from fullft.tracing import device_type


class PlannedStorage(Storage):
    """Makes fake arrays, used while tracing.

    Args:
        device: that would compute.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, Path())

    def buffer(self, num_bytes: int) -> torch.Tensor:
        """Allocate as for real; a fake tensor has no address to be aligned."""
        if device_type(self.device) != "cpu":
            return locked_block(num_bytes)
        return torch.empty(num_bytes + PAGE, dtype=torch.uint8)[:num_bytes]

    def host_memory(self, num_bytes: int) -> torch.Tensor:
        """Allocate as much as would be locked."""
        if device_type(self.device) == "cuda":
            return torch.zeros(locked_bytes(num_bytes), dtype=torch.uint8, pin_memory=True)[:num_bytes]
        return super().host_memory(num_bytes)

    def workers(self) -> Workers:
        """Return workers that move nothing."""
        return _IdleWorkers(self.device)

    def open_file(self) -> DiskFile:
        """Return a file that only counts its bytes."""
        return _PlannedFile()


class _IdleWorkers(Workers):
    def submit(self, work: Callable[..., None], *arguments: Any) -> "Future[None]":
        future: Future[None] = Future()
        future.set_result(None)
        return future


class _PlannedFile(DiskFile):
    def __init__(self) -> None:
        self.num_bytes = 0

    def _take_space(self, size: int) -> None:
        pass

    def transfer(self, operation: Callable[..., int], offset: int, memory: torch.Tensor) -> None:
        pass
