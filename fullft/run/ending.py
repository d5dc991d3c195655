"""How a run of several ranks ends: whatever ends one rank ends all of them, with one message and one exit code.

The ranks share a store of keys and values (torch's `TCPStore`, served by rank 0 or by torchrun). A rank that fails
writes the cause there; the first to write wins. Rank 0 prints it, and all end with its exit code. In each rank a thread
does this, and looks into the store twice a second: the main thread may be waiting for a rank that is gone.

A rank that has merely lost another one, or has waited for it in vain, is not the cause. It first waits for the cause.
If none comes, it calls the roll: each rank's thread answers whether its main thread waits too, and at which line it is.
A rank that does not answer has ended; one that does not wait hangs.

Imports no torch: the thread starts before torch is there.
"""

import json
import os
import re
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fullft.config.ranks import LAUNCHER, Place
from fullft.errors import FullftError, StoppedBySignal, tell_through

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_POLL_SECONDS = 0.5
_FAST_POLL_SECONDS = 0.05  # once something has happened
_HEAD_START_SECONDS = 0.3  # for rank 0, where all ranks fail alike: it need not name itself
_CAUSE_SECONDS = 2.0  # for a rank that has lost another one to learn why
_ROLL_SECONDS = 3.0
_UNWIND_SECONDS = 3.0  # for the main thread to end by itself, which closes what is open
_STORE_SECONDS = 5.0  # for rank 0 to take a message
_SEEN_SECONDS = 1.5  # for the others to see the cause
_LAUNCHER_SECONDS = 3.0  # for the launcher to report that rank 0 was killed, and to end this rank

# Keys of the store; the last two have the rank behind them.
_CAUSE, _TOLD, _SEEN, _ROLL, _HERE, _HOST = "cause", "told", "seen", "roll", "here/", "host/"

# What all ranks of a machine find by themselves before they have met: the first one alone reports it.
_FOUND_BY_ALL = (FullftError, ImportError, KeyboardInterrupt)
_INTACT = "the checkpoints saved so far are intact"


@dataclass(frozen=True)
class Cause:
    """Why a run ends.

    Attributes:
        exit_code: of all ranks.
        message: for the user.
        rank: the one that says so.
        names_rank: whether the message says all that there is to say about ranks.
        before: printed before the message, such as a traceback.
    """

    exit_code: int
    message: str
    rank: int
    names_rank: bool = False
    before: str = ""


@dataclass(frozen=True)
class _Failure:
    """What has ended this rank's main thread, or the collectives that it waits for.

    Attributes:
        cause: of the run's end, if there is no other.
        kind: "lost" or "timeout" if it is probably due to another rank, else "own".
        time: when it happened, in seconds of the monotonic clock.
        line: of the code that waited for the others; None if it still does.
    """

    cause: Cause
    kind: str
    time: float
    line: str | None = None


class Ending:
    """Ends this rank when another one has failed, and the others when this one has.

    Args:
        place: this process among the ranks.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.timeout_seconds = 0  # of collectives: for messages
        self.is_known = False  # why the run ends
        self._store: Store | None = None
        self._find_failure: Callable[[], str | None] = lambda: None
        self._failure: _Failure | None = None
        self._is_main_done, self._has_news, self._is_over = threading.Event(), threading.Event(), threading.Event()
        self._is_leaving = self._has_answered = False
        self._roll_called_at: float | None = None
        self._thread = threading.Thread(target=self._watch, name="ending", daemon=True)
        self._began_to_look_at = time.monotonic()
        self._without_store = threading.Lock()
        launcher = os.environ.get(LAUNCHER, "")
        self._launcher = int(launcher) if launcher.isdecimal() else None

    def begin(self) -> None:
        """Take over the reporting of errors, and start the thread."""
        tell_through(self._tell)
        self._thread.start()

    def connect(self, store: "Store", host: str, find_failure: Callable[[], str | None]) -> None:
        """Begin to share causes with the other ranks.

        Args:
            store: a connection for this purpose alone.
            host: the name of this machine.
            find_failure: returns "lost" or "timeout" when a collective has failed in the background, else None.
        """
        store.set(f"{_HOST}{self.place.rank}", host)
        self._find_failure = find_failure
        self._store = store

    def leave(self, wait_for_all: Callable[[], None]) -> None:
        """Stop at the end of a run that has not failed.

        Args:
            wait_for_all: returns when every rank has called it.
        """
        self._is_leaving = True  # soon rank 0 may be gone, and the store with it
        wait_for_all()
        if self.is_known:
            self._wait_for_end()
        self._is_over.set()
        self._has_news.set()
        self._thread.join(_STORE_SECONDS)  # an interpreter that ends kills threads, and C++ code in one then aborts

    def _tell(self, error: BaseException, user_error: FullftError, before: str) -> int:
        """Hand an error that has ended the main thread over to the thread, which ends the process.

        Returns:
            The exit code, if the ranks have not met: then each ends by itself.
        """
        stopped = isinstance(user_error, StoppedBySignal)  # wherever the signal was
        cause = Cause(user_error.exit_code, str(user_error), self.place.rank, stopped, before)
        if self._store is None or self._is_over.is_set():
            if self.place.local_rank == 0 or not isinstance(error, _FOUND_BY_ALL):
                _print(cause, f"rank {self.place.rank}")
            return cause.exit_code
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)  # it ends anyway
        _, line = _position(reversed(list(traceback.walk_tb(error.__traceback__))))
        self._failure = _Failure(cause, kind_of(error), time.monotonic(), line)
        self._is_main_done.set()
        self._has_news.set()
        self._wait_for_end()

    def _wait_for_end(self) -> NoReturn:
        """Let the thread end this process, unless it is stuck in an operation of the store."""
        while self.is_known or time.monotonic() < self._began_to_look_at + _STORE_SECONDS:
            time.sleep(_FAST_POLL_SECONDS)
        self._end_without_store()

    # ------------------------------------------------------------------------------------------ the thread

    def _watch(self) -> None:
        while not self._is_over.is_set():
            self._has_news.wait(_POLL_SECONDS if self._failure is None else _FAST_POLL_SECONDS)
            self._has_news.clear()
            if self._launcher not in (None, os.getppid()):  # killed, so that it could not end its ranks
                os.killpg(os.getpgrp(), signal.SIGKILL)  # with the processes that read data for this one
            self._began_to_look_at = time.monotonic()
            if self._store is not None:
                try:
                    self._look(self._store)
                except RuntimeError:
                    if not self._is_leaving or self._failure is not None:
                        self._end_without_store()

    def _look(self, store: "Store") -> None:
        """Look whether the run is to end, and do the next thing for it."""
        if store.check([_CAUSE]):
            self._end(store, Cause(**json.loads(store.get(_CAUSE))))
        if self._failure is None and (kind := self._find_failure()) is not None:
            text = "a collective of NCCL has failed; NCCL_DEBUG=WARN shows more"
            self._failure = _Failure(Cause(FullftError.exit_code, text, self.place.rank), kind, time.monotonic())
        if not self._has_answered and store.check([_ROLL]):
            self._has_answered = True
            waits, line = _main_thread_position()
            if self._failure is not None:
                waits, line = True, self._failure.line or line
            store.set(f"{_HERE}{self.place.rank}", json.dumps([waits, line]))
        if self._failure is not None and (cause := self._judge(store, self._failure)) is not None:
            first = store.compare_set(_CAUSE, "", json.dumps(asdict(cause)))
            self._end(store, Cause(**json.loads(first)))

    def _judge(self, store: "Store", failure: _Failure) -> Cause | None:
        """Return why the run ends, as far as this rank can know; None for now, if the cause may yet be told."""
        age = time.monotonic() - failure.time
        if failure.kind == "own":
            return failure.cause if self.place.rank == 0 or age > _HEAD_START_SECONDS else None
        if age < _CAUSE_SECONDS:
            return None
        if self._roll_called_at is None:
            self._roll_called_at = time.monotonic()
            store.set(_ROLL, "")
        ranks = range(self.place.count)
        here = {rank: f"{_HERE}{rank}" for rank in ranks}
        if not store.check(list(here.values())):
            if time.monotonic() - self._roll_called_at < _ROLL_SECONDS:
                return None
            rank = next(rank for rank in ranks if not store.check([here[rank]]))
            return self._not_answering(store, rank, failure.kind)
        if failure.kind == "timeout":
            answers = {rank: json.loads(store.get(here[rank])) for rank in ranks}
            # On a GPU all main threads that wait are at the line that reads a number from the device.
            own_line = answers[self.place.rank][1]
            for rank, (waits, line) in answers.items():
                if not waits and line != own_line:
                    return self._hanging(store, rank, f"hangs at {line}")
            return self._all_waiting(own_line)
        return failure.cause

    def _not_answering(self, store: "Store", rank: int, kind: str) -> Cause:
        if kind == "timeout":
            return self._hanging(store, rank, "hangs, or has ended")
        text = f"{self._name(store, rank)} ended without a word (killed? out of memory?); {_INTACT}"
        return Cause(FullftError.exit_code, text, self.place.rank, names_rank=True)

    def _all_waiting(self, line: str) -> Cause:
        text = f"all ranks waited for each other for {self.timeout_seconds:,} s, this one at {line}; {_INTACT}"
        return Cause(FullftError.exit_code, text, self.place.rank)

    def _hanging(self, store: "Store", rank: int, how: str) -> Cause:
        return Cause(
            FullftError.exit_code,
            f"{self._name(store, rank)} did not answer for {self.timeout_seconds:,} s: it {how}; {_INTACT}\n"
            "if it is only slow, let the others wait longer with --ddp_timeout",
            self.place.rank,
            names_rank=True,
        )

    def _name(self, store: "Store", rank: int) -> str:
        """Name a rank, and its machine where there are several."""
        key = f"{_HOST}{rank}"
        if self.place.machines == 1 or not store.check([key]):
            return f"rank {rank}"
        return f"rank {rank} on {store.get(key).decode()}"

    # ------------------------------------------------------------------------------------------ the end

    def _end(self, store: "Store", cause: Cause) -> NoReturn:
        """End this process; on rank 0, once the user and the others know why."""
        self.is_known = True
        speaks = self.place.rank == 0
        if speaks:
            is_main_done = self._is_main_done.is_set()
            # A progress bar may be on the line.
            _print(cause, self._name(store, cause.rank), "" if is_main_done else "\n")
            with suppress(RuntimeError):
                store.set(_TOLD, "")
        elif cause.rank == self.place.rank and not _wait_for(lambda: store.check([_TOLD]), _STORE_SECONDS):
            _print(cause, f"rank {cause.rank}")  # rank 0 has not taken it
        with suppress(RuntimeError):
            store.add(_SEEN, 1)
        self._is_main_done.wait(_UNWIND_SECONDS)  # it may be in a collective, which ends when the other rank does
        if speaks:  # and perhaps serves the store
            with suppress(RuntimeError):
                _wait_for(lambda: store.add(_SEEN, 0) >= self.place.count, _SEEN_SECONDS)
        _exit(cause.exit_code)

    def _end_without_store(self) -> NoReturn:
        """End this process though rank 0, which serves the store, has gone or hangs."""
        self._without_store.acquire()  # and never release it: one of the two threads does this
        if self._launcher is not None:
            time.sleep(_LAUNCHER_SECONDS)  # it sees more, reports it, and ends this process
        own = self._failure
        if own is not None and own.kind == "own":
            _print(own.cause, f"rank {self.place.rank}")
            _exit(own.cause.exit_code)
        if self.place.rank == 1:  # one message is enough
            text = f"rank 0 hangs, or ended without a word; {_INTACT}"
            _print(Cause(FullftError.exit_code, text, self.place.rank, names_rank=True))
        _exit(FullftError.exit_code)


def _print(cause: Cause, rank: str = "", before: str = "") -> None:
    """Print a message on stderr.

    Args:
        cause: whose message it is.
        rank: the name of the rank that says so; rank 0 need not be named.
        before: what is to come first.
    """
    first, *more = cause.message.splitlines() or [""]
    first += f" ({rank})" if cause.rank != 0 and not cause.names_rank else ""
    text = "\n".join([f"error: {first}", *more])
    print(f"{before}{cause.before}{text}", file=sys.stderr, flush=True)


def _exit(code: int) -> NoReturn:
    """End the process without its atexit functions: the other ranks, which those would wait for, end too."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait_for(is_so: Callable[[], bool], seconds: float) -> bool:
    """Wait until something is so, and return whether it became so in time."""
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(_FAST_POLL_SECONDS)
    return True


# ---------------------------------------------------------------------------------------------- what has happened


def kind_of(error: BaseException) -> str:
    """Return "timeout" or "lost" for an error of a collective, which another rank has probably caused, else "own".

    Args:
        error: any exception; its causes are looked at too.
    """
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause)
        # gloo has no class for its errors. Those of NCCL and of the store are torch.distributed's.
        if isinstance(cause, RuntimeError) and ("/gloo/" in text or type(cause).__module__ == "torch.distributed"):
            return "timeout" if re.search("timed? ?out", text, re.IGNORECASE) else "lost"
        cause = cause.__cause__ or cause.__context__
    return "own"


def _main_thread_position() -> tuple[bool, str]:
    """Return whether the main thread is in a collective, and the line that it has reached outside of torch."""
    return _position(traceback.walk_stack(sys._current_frames().get(threading.main_thread().ident or 0)))


def _position(frames: Iterable[tuple[types.FrameType, int]]) -> tuple[bool, str]:
    """Return whether the innermost frames are those of a collective, and the line that has called torch.

    Args:
        frames: and their line numbers, the innermost first.
    """
    is_collective = False
    for frame, line in frames:
        parts = Path(frame.f_code.co_filename).parts
        if "torch" not in parts:
            return is_collective, f"{'/'.join(parts[-3:])}:{line}"
        is_collective = is_collective or "distributed" in parts
    return is_collective, "?"


# ---------------------------------------------------------------------------------------------- of this process

_ending: Ending | None = None


def watch_ranks(place: Place) -> Ending:
    """Make this process end with the other ranks, from now on; later calls return the same object.

    Args:
        place: this process among several ranks.
    """
    global _ending
    if _ending is None:
        _ending = Ending(place)
        _ending.begin()
    return _ending


def is_ending() -> bool:
    """Return whether the run is about to end because a rank has failed."""
    return _ending is not None and _ending.is_known
