"""The launcher of `--gpus N`: what it starts, what it passes on, and how it ends. Most of its ranks need no torch."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fork_server import ROOT, Run
from models import make_config
from rank_jobs import errors_in

from fullft.run.launch import must_launch

LAUNCH = """
import os, signal, subprocess, sys, time
from fullft.config.ranks import find_place
from fullft.run import launch
if find_place().count == 1:
    launch.GRACE_SECONDS = 1.0
    code = launch.launch(3)
    assert "torch" not in sys.modules
    sys.exit(code)
rank = find_place().rank
def ready():
    open(f"ready-{rank}", "w").write(str(os.getpid()))
"""
# With torch, and what train.py does first.
JOIN = """
from fullft.errors import report_uncaught_errors
from fullft.run.ending import watch_ranks
report_uncaught_errors(debug=False)
watch_ranks(find_place())
os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"
import torch
from fullft.config.parse import parse_config
from fullft.ranks import sum_over_ranks
from fullft.run.joining import join_ranks
from fullft.run.signals import StopRequest
join_ranks(parse_config(["--model", "m"]))
"""
Launch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Start a launcher in an empty folder, with three ranks that run the given code."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str, **environment: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH + code, "word"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Shells that start pytest in the background make it ignore the first.
            preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)],
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_until_ready(folder: Path) -> list[int]:
    """Wait until all ranks are ready, and return their process ids."""
    files = [folder / f"ready-{rank}" for rank in range(3)]
    deadline = time.monotonic() + 30
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [int(file.read_text()) for file in files]


def has_ended(pid: int) -> bool:
    """Return whether a process has ended; a zombie that awaits its parent has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for_ends(pids: list[int], seconds: float = 5) -> bool:
    deadline = time.monotonic() + seconds
    while not all(map(has_ended, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return all(map(has_ended, pids))


def end(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Wait for a launcher, and return its exit code and all that was printed."""
    stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout + stderr


# ---------------------------------------------------------------------------------------------- what it starts


@pytest.mark.parametrize(
    ("options", "started", "launches"),
    [
        ({"gpus": 2}, {}, True),
        ({}, {}, False),
        ({"gpus": 1}, {}, False),
        ({"gpus": 2, "plan": True}, {}, False),
        ({"gpus": 2, "preview": 3}, {}, False),
        ({"gpus": 2}, {"RANK": "1", "WORLD_SIZE": "2"}, False),
    ],
)
def test_gpus_launch_ranks_once(
    options: dict[str, Any], started: dict[str, str], launches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    assert must_launch(make_config(**options)) is launches


def test_ranks_get_their_places_and_words(launch: Launch, tmp_path: Path) -> None:
    code = """
import json
names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS".split()
answer = {name: os.environ[name] for name in names} | {"words": sys.argv, "stdin": sys.stdin.read()}
open(f"answer-{rank}", "w").write(json.dumps(answer))
"""
    assert end(launch(code, OMP_NUM_THREADS="5", MASTER_PORT="1", TORCHELASTIC_USE_AGENT_STORE="True"))[0] == 0
    answers = [json.loads((tmp_path / f"answer-{rank}").read_text()) for rank in range(3)]
    port = answers[0]["MASTER_PORT"]
    assert int(port) > 1024
    for rank, answer in enumerate(answers):
        assert answer == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "3",
            "LOCAL_WORLD_SIZE": "3",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "5",
            "words": ["-c", "word"],
            "stdin": "",
        }


def test_ranks_share_the_cores(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    _, text = end(launch("os.write(1, f'{os.environ[\"OMP_NUM_THREADS\"]} threads\\n'.encode())"))
    assert text == f"{max(1, len(os.sched_getaffinity(0)) // 3)} threads\n" * 3


# ---------------------------------------------------------------------------------------------- how ranks end


def test_first_failure_decides_the_exit_code(launch: Launch) -> None:
    code, text = end(launch("time.sleep(0 if rank == 1 else 0.5)\nsys.exit([6, 5, 0][rank])"))
    assert code == 5 and text == ""


def test_killed_rank_is_reported(launch: Launch, tmp_path: Path) -> None:
    process = launch("ready()\ntime.sleep(60)")
    pids = wait_until_ready(tmp_path)
    os.kill(pids[1], signal.SIGKILL)
    code, text = end(process)
    assert code == 128 + signal.SIGKILL
    assert text.startswith("\nerror: rank 1 was killed (SIGKILL), perhaps because this machine ran out of memory; ")
    assert len(text.strip().splitlines()) == 1 and wait_for_ends(pids)


def test_crash_after_an_error_is_not_reported(launch: Launch) -> None:
    """An error is told by rank 0; ranks may crash when another one has gone."""
    code, text = end(launch("if rank == 0: os.abort()\ntime.sleep(0.3)\nsys.exit(8)"))
    assert code == 8 and "error" not in text
    code, text = end(launch("if rank == 0: os.abort()\ntime.sleep(60)"))  # the negative control
    assert code == 128 + signal.SIGABRT and "error: rank 0 crashed with SIGABRT" in text


def test_survivors_of_an_error_are_killed(launch: Launch, tmp_path: Path) -> None:
    code = """
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(f"worker-{rank}", "w").write(str(worker.pid))
ready()
time.sleep(60 if rank else 0.5)
sys.exit(3)
"""
    process = launch(code)
    pids = wait_until_ready(tmp_path)
    assert end(process) == (3, "")
    workers = [int((tmp_path / f"worker-{rank}").read_text()) for rank in range(3)]
    assert wait_for_ends(pids + workers)


# ---------------------------------------------------------------------------------------------- signals

COUNT_SIGNALS = """
got = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, _: got.append(number))
ready()
while not got: time.sleep(0.01)
time.sleep(0.3)
os.write(1, f"got {list(map(int, got))}\\n".encode())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_reaches_each_rank_once(number: signal.Signals, launch: Launch, tmp_path: Path) -> None:
    process = launch(COUNT_SIGNALS + "sys.exit(128 + got[0])")
    wait_until_ready(tmp_path)
    process.send_signal(number)
    assert end(process) == (128 + number, f"got [{int(number)}]\n" * 3)


def test_ranks_have_all_time_after_a_signal(launch: Launch, tmp_path: Path) -> None:
    process = launch(COUNT_SIGNALS + "time.sleep(2)\nos.write(1, b'saved')")  # more than the grace of a failure
    wait_until_ready(tmp_path)
    process.send_signal(signal.SIGTERM)
    code, text = end(process)
    assert code == 0 and text.count("saved") == 3


def test_second_signal_ends_at_once(launch: Launch, tmp_path: Path) -> None:
    process = launch(COUNT_SIGNALS + "time.sleep(60)")
    pids = wait_until_ready(tmp_path)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGHUP)  # a hangup is no second request
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, text = end(process)
    assert code == 130 and errors_in(text) == ["error: stopped at once; the checkpoints saved so far are intact"]
    assert wait_for_ends(pids)


def test_signal_before_the_loop_ends_silently(launch: Launch, tmp_path: Path) -> None:
    process = launch("ready()\ntime.sleep(60)")
    pids = wait_until_ready(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert end(process) == (143, "") and wait_for_ends(pids)


def test_ranks_end_with_a_killed_launcher(launch: Launch, tmp_path: Path) -> None:
    watch = "from fullft.run.ending import watch_ranks\nif rank: watch_ranks(find_place())\n"
    process = launch(watch + "ready()\ntime.sleep(60)")
    pids = wait_until_ready(tmp_path)
    process.kill()
    assert wait_for_ends(pids[1:])
    assert not has_ended(pids[0])  # the negative control does not watch
    os.kill(pids[0], signal.SIGKILL)


# ---------------------------------------------------------------------------------------------- with torch


def test_launched_ranks_stop_at_the_same_step(launch: Launch, tmp_path: Path) -> None:
    code = """
with StopRequest() as stop:
    ready()
    for step in range(1, 10**6):
        if stop.was_asked():
            open(f"stopped-{rank}-{step}", "w")
            stop.end_run_if_asked(step)
"""
    process = launch(JOIN + code)
    wait_until_ready(tmp_path)
    process.send_signal(signal.SIGTERM)
    code_, text = end(process)
    assert code_ == 143
    stopped = [file.name.split("-")[1:] for file in sorted(tmp_path.glob("stopped-*"))]
    assert [rank for rank, _ in stopped] == ["0", "1", "2"] and len({step for _, step in stopped}) == 1
    (line,) = errors_in(text)
    assert line.startswith(f"error: stopped by SIGTERM after step {stopped[0][1]}; the same command with ")
    assert text.count("finishing the step") == 1


def test_killed_rank_is_reported_once(launch: Launch) -> None:
    """Ranks that have lost it leave that to the launcher."""
    steps = "for step in range(10**6):\n    if step == 3 and rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n    "
    code, text = end(launch(JOIN + steps + "sum_over_ranks(torch.ones(1))"))
    assert code == 137
    (line,) = errors_in(text)
    assert line.startswith("error: rank 1 was killed (SIGKILL)")


@pytest.mark.slow
def test_train_py_launches_its_ranks(run: Run) -> None:
    done = run("--gpus", "2", "--model", "nowhere", "--ddp_timeout", "60")
    assert done.returncode == 4 and len(errors_in(done.stdout + done.stderr)) == 1
    wrong = run("--gpus", "2", "--modell", "nowhere")
    assert wrong.returncode == 2 and len(errors_in(wrong.stdout + wrong.stderr)) == 1
