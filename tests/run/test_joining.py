"""Ranks find each other, or one message says why not."""

import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from fork_server import ForkServer
from rank_jobs import Ended, Job, free_port

from fullft.run import joining

ADDRESS = "127.0.0.1"


@pytest.fixture
def port() -> int:
    return free_port()


def end(server: ForkServer, cwd: Path, port: int | str, *, timeout: int = 1, **options: object) -> Ended:
    """Run two ranks that are to meet at a port, and give up early."""
    words = f"--ddp_timeout {timeout} {options.pop('words', '')}"
    return Job(server, cwd, "print('joined')", words=words, MASTER_PORT=str(port), **options).end()  # type: ignore[arg-type]


def test_ranks_meet(fork_server: ForkServer, tmp_path: Path, port: int) -> None:
    ended = end(fork_server, tmp_path, port, timeout=20)
    assert ended.codes == [0, 0] and ended.stdout == ["joined\n", ""]


def test_other_options_are_refused_by_name(fork_server: ForkServer, tmp_path: Path, port: int) -> None:
    ended = end(fork_server, tmp_path, port, timeout=20, words="--seed 10RANK --weight_decay 0.RANK")
    assert ended.codes == [2, 2]
    (line,) = ended.errors
    assert line.endswith(" than rank 0: seed is 101, not 100; weight_decay is 0.1, not 0.0 (rank 1)")
    assert "start all ranks with the same command" in ended.stderr


def test_rank_that_does_not_come_is_named(fork_server: ForkServer, tmp_path: Path, port: int) -> None:
    ended = end(fork_server, tmp_path, port, started=[0])
    assert ended.codes == [1]
    assert ended.errors == [f"error: rank 1 did not come to {ADDRESS}:{port} within 1 s"]
    assert "WORLD_SIZE" in ended.stderr


def test_address_without_rank_0_is_named(fork_server: ForkServer, tmp_path: Path, port: int) -> None:
    ended = end(fork_server, tmp_path, port, started=[1], LOCAL_RANK="0")
    assert ended.codes == [1] and ended.seconds < 30
    assert ended.errors == [
        f"error: rank 0 cannot be reached at {ADDRESS}:{port} within 1 s (Connection refused) (rank 1)"
    ]


def test_unknown_host_is_named_at_once(fork_server: ForkServer, tmp_path: Path, port: int) -> None:
    ended = end(fork_server, tmp_path, port, timeout=60, started=[1], LOCAL_RANK="0", MASTER_ADDR="no-host.invalid")
    assert ended.codes == [1] and ended.seconds < 30
    (line,) = ended.errors
    assert line.startswith(f"error: rank 0 cannot be reached at no-host.invalid:{port} (")


def test_missing_address_is_a_mistake_in_options(fork_server: ForkServer, tmp_path: Path) -> None:
    ended = end(fork_server, tmp_path, "")
    assert ended.codes == [2, 2]
    (line,) = ended.errors
    assert "MASTER_ADDR and MASTER_PORT are not" in line


@pytest.mark.parametrize(
    ("rank", "message"), [(0, "of this machine is taken"), (1, "is not rank 0 (no answer)")], ids=["serving", "asking"]
)
def test_port_of_another_program_is_named(
    rank: int, message: str, fork_server: ForkServer, tmp_path: Path, port: int
) -> None:
    with socket.create_server((ADDRESS, port)):
        before = "joining._ANSWER_SECONDS = 1"
        ended = end(fork_server, tmp_path, port, started=[rank], LOCAL_RANK="0", before=before)
    assert ended.codes == [1]
    (line,) = ended.errors
    assert message in line and str(port) in line and "MASTER_PORT" in ended.stderr


@pytest.mark.parametrize(
    ("errors", "kind"),
    [
        ([], None),
        ([None, "SUCCESS"], None),
        (["SUCCESS", "TIMEOUT"], "timeout"),
        (["REMOTE_ERROR"], "lost"),
        (["COMM_ERROR"], "lost"),
    ],
)
def test_failures_of_nccl_are_found(
    errors: list[str | None], kind: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend without errors is gloo's."""

    def group(error: str | None) -> SimpleNamespace:
        backend = SimpleNamespace() if error is None else SimpleNamespace(get_error=lambda: SimpleNamespace(name=error))
        return SimpleNamespace(_device_types=[torch.device("cuda")], _get_backend=lambda device: backend)

    monkeypatch.setattr(joining, "_groups", lambda: [group(error) for error in errors])
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    assert joining._find_failed_collective() == kind


@pytest.mark.slow
def test_timeout_of_steps_reaches_all_groups(fork_server: ForkServer, tmp_path: Path) -> None:
    code = """
import torch.distributed as dist
group = dist.new_group([0, 1], timeout=timedelta(days=1))
joining.begin_steps(config)
if rank == 1: time.sleep(50)
dist.all_reduce(torch.ones(1), group=group)
"""
    ended = Job(fork_server, tmp_path, "from datetime import timedelta" + code, words="--ddp_timeout 1").end()
    assert ended.codes == [1, 1] and ended.seconds < 30
    assert ended.errors[0].startswith("error: rank 1 did not answer for 1 s: it hangs at <string>:")
