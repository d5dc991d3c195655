"""Host threads as actors: what a thread does is ordered after its start, and before what follows a wait for it."""

import concurrent.futures
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from emulated_cuda.library import call

# Threads take turns often, as they would if kernels did not run on the host.
SWITCH_SECONDS = 1e-4

_KNOWN = "_known_when_done"  # by a future: the number of a snapshot


def follow_threads() -> None:
    """Make Python's threads and futures hand on what they know."""
    _follow_thread()
    _follow_pool()


def _follow_thread() -> None:
    start, run, join = threading.Thread.start, threading.Thread.run, threading.Thread.join

    def started(self: Any) -> None:
        self._known_at_start = call("take_snapshot")
        start(self)

    def ran(self: Any) -> None:
        call("become_new_thread")
        _learn(self._known_at_start)
        try:
            run(self)
        finally:
            self._known_at_end = call("take_snapshot")

    def joined(self: Any, timeout: float | None = None) -> None:
        join(self, timeout)
        known = getattr(self, "_known_at_end", None)  # not of threads that began before
        if known is not None and not self.is_alive():
            call("join_snapshot", known)

    threading.Thread.start, threading.Thread.run, threading.Thread.join = started, ran, joined  # type: ignore[method-assign]


def _learn(snapshot: int) -> None:
    call("join_snapshot", snapshot)
    call("forget_snapshot", snapshot)


def _follow_pool() -> None:
    submit, result, wait = ThreadPoolExecutor.submit, Future.result, concurrent.futures.wait

    def submitted(self: Any, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> "Future[Any]":
        snapshot = call("take_snapshot")

        def run(*arguments: Any, **named: Any) -> Any:
            _learn(snapshot)
            return work(*arguments, **named)

        return submit(self, run, *arguments, **named)

    def finishing(finish: Callable[..., None]) -> Callable[..., None]:
        def finished(self: Any, value: Any) -> None:
            setattr(self, _KNOWN, call("take_snapshot"))
            finish(self, value)

        return finished

    def result_of(self: Any, timeout: float | None = None) -> Any:
        try:
            return result(self, timeout)
        finally:
            _learn_from(self)

    def waited(futures: Iterable["Future[Any]"], *arguments: Any, **named: Any) -> Any:
        done = wait(futures, *arguments, **named)
        for future in done.done:
            _learn_from(future)
        return done

    ThreadPoolExecutor.submit = submitted  # type: ignore[method-assign]
    Future.set_result, Future.set_exception = finishing(Future.set_result), finishing(Future.set_exception)  # type: ignore[method-assign]
    Future.result = result_of  # type: ignore[method-assign]
    concurrent.futures.wait = waited


def _learn_from(future: "Future[Any]") -> None:
    if (snapshot := getattr(future, _KNOWN, None)) is not None:
        call("join_snapshot", snapshot)
