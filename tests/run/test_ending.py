"""Whatever ends one rank ends all, with one message and one exit code. No launcher sees these ranks."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fork_server import ForkServer
from rank_jobs import Job

from fullft.run.ending import kind_of

Start = Callable[..., Job]
# Steps in which rank 1 does something else at the third.
STEPS = """
for step in range(1, 100):
    if step == 3 and rank == 1:
        {}
    sum_over_ranks(torch.ones(3))
"""


@pytest.fixture
def job(fork_server: ForkServer, tmp_path: Path) -> Start:
    def start(code: str, count: int = 2, words: str = "", before: str = "") -> Job:
        return Job(fork_server, tmp_path, code, count, words, before)

    return start


def test_ranks_that_succeed_exit_with_0(job: Start) -> None:
    ended = job("print('first' if is_first() else 'other', flush=True)\nsum_over_ranks(torch.ones(3))").end()
    assert ended.codes == [0, 0] and ended.stderr == ""
    assert ended.stdout == ["first\n", ""]  # only rank 0 prints


def test_error_of_one_rank_ends_all(job: Start) -> None:
    ended = job(STEPS.format("raise MemoryExhaustedError('the item is too large\\ntake less')"), 3).end()
    assert ended.codes == [8, 8, 8]
    assert ended.errors == ["error: the item is too large (rank 1)"]
    assert "\ntake less\n" in ended.stderr and "closed by peer" not in ended.stderr
    assert ended.seconds < 30


def test_error_of_all_ranks_names_none(job: Start) -> None:
    ended = job("raise NonFiniteError('step 3: the loss is nan')", 3).end()
    assert ended.codes == [7, 7, 7] and ended.errors == ["error: step 3: the loss is nan"]


def test_error_ends_a_rank_that_is_busy(job: Start) -> None:
    ended = job("if rank == 1: raise ValueError('mine')\ntime.sleep(50)").end()
    assert ended.codes == [1, 1] and ended.errors == ["error: unexpected ValueError: mine (rank 1)"]
    assert ended.seconds < 30


def test_debug_shows_one_traceback(job: Start) -> None:
    ended = job(STEPS.format("raise ValueError('mine')"), words="--debug").end()
    assert ended.stderr.count("Traceback") == 1 and ended.stderr.count("ValueError: mine") == 2


@pytest.mark.slow
def test_ranks_that_wait_for_each_other_say_so(job: Start) -> None:
    code = """
import torch.distributed as dist
groups = [dist.new_group([0, 1]) for _ in range(2)]
joining.begin_steps(config)
dist.all_reduce(torch.ones(1), group=groups[rank])
"""
    ended = job(code, words="--ddp_timeout 1").end()
    assert ended.codes == [1, 1]
    (line,) = ended.errors
    assert line.startswith("error: all ranks waited for each other for 1 s, this one at <string>:")


def test_killed_rank_is_named(job: Start) -> None:
    ended = job(STEPS.format("os.kill(os.getpid(), signal.SIGKILL)"), 3).end()
    assert ended.codes == [1, -signal.SIGKILL, 1]
    assert ended.errors == [
        "error: rank 1 ended without a word (killed? out of memory?); the checkpoints saved so far are intact"
    ]
    assert ended.seconds < 30


def test_killed_first_rank_is_named(job: Start) -> None:
    code = STEPS.replace("rank == 1", "rank == 0").format("os.kill(os.getpid(), signal.SIGKILL)")
    ended = job(code, 3).end()
    assert ended.codes == [-signal.SIGKILL, 1, 1]
    assert ended.errors == ["error: rank 0 hangs, or ended without a word; the checkpoints saved so far are intact"]


def test_hanging_rank_is_named_with_its_line(job: Start) -> None:
    ended = job(STEPS.format("time.sleep(50)"), 3, "--ddp_timeout 1").end()
    assert ended.codes == [1, 1, 1]
    (line,) = ended.errors
    assert line.startswith("error: rank 1 did not answer for 1 s: it hangs at <string>:")
    assert "--ddp_timeout" in ended.stderr and ended.seconds < 30


@pytest.mark.slow
def test_stopped_rank_is_named(job: Start) -> None:
    running = job(STEPS.format("os.kill(os.getpid(), signal.SIGSTOP)"), 3, "--ddp_timeout 1")
    try:
        while running.ranks[0].poll() is None:
            time.sleep(0.05)
    finally:
        os.kill(running.ranks[1].pid, signal.SIGKILL)
    assert running.end().errors == [
        "error: rank 1 did not answer for 1 s: it hangs, or has ended; the checkpoints saved so far are intact"
    ]


@pytest.mark.slow
def test_stopped_first_rank_is_named(job: Start) -> None:
    """The store does not answer either."""
    running = job(
        STEPS.replace("rank == 1", "rank == 0").format("os.kill(os.getpid(), signal.SIGSTOP)"), 3, "--ddp_timeout 1"
    )
    try:
        while None in (running.ranks[1].poll(), running.ranks[2].poll()):
            time.sleep(0.05)
    finally:
        os.kill(running.ranks[0].pid, signal.SIGKILL)
    ended = running.end()
    assert len(ended.errors) == 1 and ended.errors[0].startswith("error: rank 0 hangs, or ended without a word")


@pytest.mark.slow
def test_set_up_outlasts_the_timeout_of_steps(job: Start) -> None:
    """The rank that hangs, above, is the negative control."""
    ended = job("joining.end_steps()\nby_first_rank(lambda: time.sleep(2))", words="--ddp_timeout 1").end()
    assert ended.codes == [0, 0], ended.stderr


def test_signal_to_one_rank_stops_all(job: Start) -> None:
    code = """
with StopRequest() as stop:
    for step in range(1, 100):
        if step == 3 and rank == 1: os.kill(os.getpid(), signal.SIGTERM)
        if step % 50 == 0 or stop.was_asked():
            open(f"stopped-{rank}-{step}", "w")
            stop.end_run_if_asked(step)
"""
    running = job(code, 3)
    ended = running.end()
    assert ended.codes == [143, 143, 143]
    assert ended.errors[0].startswith("error: stopped by SIGTERM after step 3; ") and len(ended.errors) == 1
    assert ended.stderr.count("finishing the step") == 1


@pytest.mark.slow
def test_hang_is_found_while_main_threads_wait_for_devices(job: Start) -> None:
    """NCCL raises nothing: its failure is found in the background. The lines of the main threads tell who waits."""
    before = "began = []\njoining._find_failed_collective = lambda: 'timeout' if began and rank != 1 else None"
    code = """
def read_number(): time.sleep(50)
began.append(True)
if rank == 1:
    time.sleep(50)
read_number()
"""
    ended = job(code, 3, "--ddp_timeout 30", before=before).end()
    assert ended.codes == [1, 1, 1]
    (line,) = ended.errors
    assert line.startswith("error: rank 1 did not answer for 30 s: it hangs at <string>:") and ended.seconds < 30


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"), "lost"),
        (RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv"), "timeout"),
        (ConnectionResetError(104, "Connection reset by peer"), "own"),  # of the hub, for one
        (RuntimeError("the hub timed out"), "own"),
        (KeyboardInterrupt(), "own"),
    ],
)
def test_lost_ranks_are_told_from_own_errors(error: BaseException, kind: str) -> None:
    assert kind_of(error) == kind
    outer = ValueError("wrapped")
    outer.__cause__ = error
    assert kind_of(outer) == kind
