"""Start one process per rank on this machine: what `--gpus N` does where neither torchrun nor Slurm has started ranks.

The launcher trains nothing and imports no torch. It passes signals on, ends all ranks once one has failed, and returns
the exit code of the one that failed first. What ranks have to say, rank 0 prints (see `ending.py`); the launcher speaks
for a rank that was killed.

It is our own because torchrun kills ranks 30 s after a signal, checkpoint or not, and always exits with code 1.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fullft.config.config import Config
from fullft.config.ranks import LAUNCHER, find_place
from fullft.run.signals import SIGNALS, is_second

GRACE_SECONDS = 8.0  # for the others to end by themselves; longer than what that takes in ending.py
_CAUSE_SECONDS = 1.0  # a rank that crashes may be the second to fail, while the first is just ending
_POLL_SECONDS = 0.05


def must_launch(config: Config) -> bool:
    """Return whether this process is to start the ranks, rather than to be one."""
    return config.gpus > 1 and find_place().count == 1 and not (config.plan or config.preview)


def launch(count: int) -> int:
    """Run this very command as so many ranks, and wait for them.

    Args:
        count: of ranks.

    Returns:
        The exit code of the rank that failed first, 128 + signal for one that was killed; 0 if none failed.
    """
    ranks: list[subprocess.Popen[bytes]] = []
    with _received_signals() as received:
        try:
            shared = _shared_environment(count)
            ranks += [_start(shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)]
            return _wait(ranks, received)
        finally:
            for rank in ranks:
                _kill(rank)


@contextmanager
def _received_signals() -> Iterator[list[int]]:
    """Collect the signals that a run listens to; what is ignored, as SIGHUP is under nohup, stays ignored."""
    received: list[int] = []

    def receive(number: int, _: types.FrameType | None) -> None:
        received.append(number)

    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    former = {number: signal.signal(number, receive) for number in heard}
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _shared_environment(count: int) -> dict[str, str]:
    """Make what all ranks find in their environment, besides their number."""
    environment = dict(os.environ)
    environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # of a torchrun around us, whose store is not at our port
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // count)))
    if sys.platform == "linux":
        # All is on this machine; its own name may not be one that can be looked up.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment | {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        LAUNCHER: str(os.getpid()),
    }


def _start(environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    # In a session of its own: a terminal's Ctrl-C then reaches the launcher alone, which passes it on once.
    command = [sys.executable, *sys.orig_argv[1:]]
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)


def _kill(rank: "subprocess.Popen[bytes]") -> None:
    """Kill a rank and its own children, such as workers that read data."""
    with suppress(ProcessLookupError, PermissionError):  # macOS says the latter of zombies
        os.killpg(rank.pid, signal.SIGKILL)
    rank.wait()


# ---------------------------------------------------------------------------------------------- the end


def _wait(ranks: list["subprocess.Popen[bytes]"], received: list[int]) -> int:
    """Wait until all ranks have ended, or have had their time to; see `launch`."""
    failures: dict[int, int] = {}  # exit codes by rank, in the order of the ends
    num_forwarded, deadline = 0, None
    while any(rank.poll() is None for rank in ranks):
        for number in received[num_forwarded:]:
            for rank in ranks:
                rank.send_signal(number)  # unless it has ended
            if is_second(number, received[:num_forwarded]):
                deadline = deadline or time.monotonic() + GRACE_SECONDS
            num_forwarded += 1
        _note(failures, ranks)
        if failures:
            crashed = next(iter(failures.values())) < 0
            deadline = deadline or time.monotonic() + (_CAUSE_SECONDS if crashed else GRACE_SECONDS)
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(_POLL_SECONDS)
    _note(failures, ranks)
    return _conclude(failures, received, first_has_ended=ranks[0].poll() is not None)


def _note(failures: dict[int, int], ranks: list["subprocess.Popen[bytes]"]) -> None:
    """Add the ranks that have failed since; of several, those that ended by themselves first."""
    new = {number: rank.poll() for number, rank in enumerate(ranks) if number not in failures and rank.poll()}
    failures.update(sorted(((number, code or 0) for number, code in new.items()), key=lambda end: end[1] < 0))


def _conclude(failures: dict[int, int], received: list[int], first_has_ended: bool) -> int:
    """Say what no rank can have said, and return the exit code.

    Args:
        failures: the exit codes that are not 0, by rank, in the order of the ends.
        received: the signals that were passed on.
        first_has_ended: whether rank 0, which speaks for all, has ended.
    """
    explained = any(code > 0 for code in failures.values())  # by rank 0
    if not failures:
        if received and not first_has_ended:  # it was killed, since a second signal did not end it
            _print_error("stopped at once")
            return 128 + received[-1]
        return 0
    rank, code = next(iter(failures.items()))
    if explained:
        code = next(code for code in failures.values() if code > 0)
    elif -code not in received:
        _print_error(_obituary(rank, -code))
    return code if code > 0 else 128 - code


def _print_error(message: str) -> None:
    # Rank 0 may have left a progress bar on the line.
    print(f"\nerror: {message}; the checkpoints saved so far are intact", file=sys.stderr)


def _obituary(rank: int, number: int) -> str:
    name = signal.Signals(number).name
    if number == signal.SIGKILL:
        return f"rank {rank} was killed ({name}), perhaps because this machine ran out of memory"
    return f"rank {rank} {'was ended by' if number in SIGNALS else 'crashed with'} {name}"
