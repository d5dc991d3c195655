"""Several ranks of one job: forked, as if torchrun or Slurm had started them, and what they say and end with."""

import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fork_server import Forked, ForkServer

# What train.py does before its first step; `rank` is this one.
BEGIN = """
import os, signal, sys, time
import torch
sys.argv = ["train.py", "--model", "m", *(word.replace("RANK", os.environ["RANK"]) for word in WORDS)]
from fullft.start import start
config = start()
from fullft.config.ranks import find_place
from fullft.errors import DataError, MemoryExhaustedError, NonFiniteError
from fullft.ranks import *
from fullft.run import joining
from fullft.run.signals import StopRequest
rank = find_place().rank
BEFORE
device = joining.join_ranks(config)
joining.begin_steps(config)
"""


class Ended(NamedTuple):
    """How a job has ended.

    Attributes:
        codes: of the ranks; minus the signal for one that was killed.
        stdout: of each rank.
        stderr: of all ranks.
        seconds: since the start.
    """

    codes: list[int | None]
    stdout: list[str]
    stderr: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        """The lines of all ranks that report an error."""
        return errors_in("".join(self.stdout) + self.stderr)


def errors_in(text: str) -> list[str]:
    return [line for line in text.splitlines() if "error:" in line]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Job:
    """Ranks that do what train.py does first, and then run some code.

    Args:
        server: forks them.
        cwd: the folder that they start in.
        code: of each.
        count: of ranks.
        words: more of their command line; RANK in it becomes each rank's number.
        before: code that they run before they join each other.
        started: the ranks that are started; all by default.
        environment: more of it, for instance MASTER_ADDR.
    """

    def __init__(
        self,
        server: ForkServer,
        cwd: Path,
        code: str,
        count: int = 2,
        words: str = "",
        before: str = "",
        started: Sequence[int] | None = None,
        **environment: str,
    ) -> None:
        self._began = time.monotonic()
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
        shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "HF_HUB_OFFLINE": "1"}
        code = BEGIN.replace("WORDS", repr(words.split())).replace("BEFORE", before) + code
        self.ranks = [
            Forked(server, ["-c", code], cwd, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | environment)
            for rank in (range(count) if started is None else started)
        ]

    def end(self, timeout: float = 60) -> Ended:
        """Wait for all ranks.

        Args:
            timeout: for each, in seconds.
        """
        outputs = [rank.communicate(timeout) for rank in self.ranks]
        return Ended(
            [rank.returncode for rank in self.ranks],
            [stdout for stdout, _ in outputs],
            "".join(stderr for _, stderr in outputs),
            time.monotonic() - self._began,
        )
