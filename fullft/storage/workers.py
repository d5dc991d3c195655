"""Threads that move data next to the computation."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

# As many as there are chunks on their way: one comes, one is computed on, one goes.
THREADS = 3


def mark_computed(device: torch.device) -> torch.Event | None:
    """Mark how far the computation on an accelerator has come; a CPU's is never behind.

    Args:
        device: that computes.
    """
    return None if device.type == "cpu" else torch.accelerator.current_stream(device).record_event()


class Workers:
    """Threads that move data. Disks and accelerators work by themselves, while Python waits for them here.

    Args:
        device: that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._threads: ThreadPoolExecutor | None = None
        # One stream each way: an accelerator copies in both directions at once.
        self._copies = None if device.type == "cpu" else {way: torch.Stream(device) for way in ("in", "out")}

    def submit(self, work: Callable[..., None], *arguments: Any) -> "Future[None]":
        """Start some work.

        Args:
            work: calls no operator that allocates.
            arguments: that it is called with.
        """
        if self._threads is None:
            # torch starts a team of threads per Python thread. A second large one would slow both down several times.
            self._threads = ThreadPoolExecutor(THREADS, "offload", initializer=torch.set_num_threads, initargs=(1,))
        # The thread's own record of its work outlives the result for a moment; the arguments' memory must not.
        box = [arguments]
        return self._threads.submit(lambda: work(*box.pop()))

    @contextmanager
    def copying(self, way: str, after: torch.Event | None = None) -> Iterator[None]:
        """Queue the body's copies on a stream of their own, and wait for them at the end. A CPU copies at once.

        Args:
            way: `in`, to the device, or `out`.
            after: an event of the computation to wait for first.
        """
        if self._copies is None:
            yield
            return
        stream = self._copies[way]
        if after is not None:
            stream.wait_event(after)
        with stream:
            yield
        stream.synchronize()
