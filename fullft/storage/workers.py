"""What moves data next to the computation: threads, and an accelerator's streams.

Two kinds of waiting are kept apart. Streams wait for events, while the host goes on: that is `copy` and
`compute_after`. Threads wait for disks, and for events where the host itself needs the bytes: that is `start` and
`wait_for`. On a CPU there are no events: None takes their place, and everything before it is done.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

# As many as there are chunks on their way: one comes, one is computed on, one goes.
THREADS = 3

# Of some work that ends with copies: the event after which they are done.
Moved = Future[torch.Event | None]


def mark_computed(device: torch.device) -> torch.Event | None:
    """Mark how far the computation on an accelerator has come; a CPU's is never behind.

    Args:
        device: that computes.
    """
    return None if device.type == "cpu" else torch.accelerator.current_stream(device).record_event()


def wait_for(event: torch.Event | None) -> None:
    """Make this thread wait for an event, before it reads what was copied or writes where it was copied from."""
    if event is not None:
        event.synchronize()


def wait_for_all(device: torch.device) -> None:
    """Make this thread wait for all copies: before the host touches arrays that streams copy, or frees them.

    Args:
        device: that computes.
    """
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def moved(event: torch.Event | None) -> Moved:
    """Return the future of work that need not be started any more."""
    future: Moved = Future()
    future.set_result(event)
    return future


class Workers:
    """Move data. Disks and accelerators work by themselves; where somebody must wait for them, it is a thread here.

    Args:
        device: that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._threads: ThreadPoolExecutor | None = None
        # One stream each way: an accelerator copies in both directions at once.
        self._streams = None if device.type == "cpu" else {way: torch.Stream(device) for way in ("in", "out")}

    def start(self, work: Callable[..., torch.Event | None], *arguments: Any, waits: bool) -> Moved:
        """Start some work in a thread; what only queues copies on an accelerator is done at once.

        Args:
            work: calls no operator that allocates; returns the event of its copies.
            arguments: that it is called with.
            waits: whether it waits for a disk, or for work of the host. A CPU's copies always keep a thread busy.
        """
        if self._streams is not None and not waits:
            return moved(work(*arguments))
        if self._threads is None:
            # torch starts a team of threads per Python thread. A second large one would slow both down several times.
            self._threads = ThreadPoolExecutor(THREADS, "offload", initializer=torch.set_num_threads, initargs=(1,))
        # The thread's own record of its work outlives the result for a moment; the arguments' memory must not.
        box = [arguments]
        return self._threads.submit(lambda: work(*box.pop()))

    def copy(
        self, way: str, copies: Iterable[tuple[torch.Tensor, torch.Tensor]], after: torch.Event | None
    ) -> torch.Event | None:
        """Queue copies on a stream of their own; a CPU makes them at once.

        Args:
            way: `in`, to the device, or `out`.
            copies: targets, each with its source; their memory must outlast the copies.
            after: the event that they wait for.

        Returns:
            The event after which they are done.
        """
        if self._streams is None:
            for target, source in copies:
                target.copy_(source)
            return None
        stream = self._streams[way]
        if after is not None:
            stream.wait_event(after)
        with stream:
            for target, source in copies:
                target.copy_(source, non_blocking=True)
        return stream.record_event()

    def compute_after(self, event: torch.Event | None) -> None:
        """Make the computation on the device wait for an event; the host goes on."""
        if event is not None:
            torch.accelerator.current_stream(self.device).wait_event(event)
