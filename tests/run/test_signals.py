"""Signals: a run that is asked to stop saves what it has."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from fork_server import Run
from small_runs import OUT, SMALL, train_small, words_of

from fullft.errors import StoppedBySignal
from fullft.run.signals import StopRequest
from fullft.saving.checkpoint import verify

# A run of the miniature that gets a signal at the end of its second step.
STOPPED = """
import os, runpy, signal, sys
from fork_server import ROOT
from fullft.run.log import Log
from small_runs import miniature

def step(log, number, *more):
    of_log(log, number, *more)
    if number == 2:
        os.kill(os.getpid(), SIGNAL)

of_log, Log.step = Log.step, step
signal.signal(SIGNAL, signal.default_int_handler if SIGNAL == signal.SIGINT else FORMER)
sys.argv = ["train.py", *WORDS]
with miniature():
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
"""


def stopped(run: Run, number: int, former: signal.Handlers = signal.SIG_DFL, before: str = "") -> Any:
    """Stop a run of four steps in its second one.

    Args:
        run: the fixture.
        number: the signal that it gets.
        former: what handles the signal before the run starts; SIGINT has Python's own handler.
        before: code to run first.
    """
    words = words_of(SMALL | {"max_steps": 4, "save_strategy": "no"})
    code = STOPPED.replace("SIGNAL", str(int(number))).replace("FORMER", str(int(former)))
    return run("-c", before + code.replace("WORDS", str(words)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_a_checkpoint_to_resume(
    number: signal.Signals, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = stopped(run, number)
    assert done.returncode == 128 + number
    (checkpoint,) = OUT.glob("checkpoint-*")
    assert verify(checkpoint).state["step"] == 2
    assert f"{number.name}: finishing the step and saving a checkpoint" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last == f"error: stopped by {number.name} after step 2; the same command with " + (
        "--resume_from_checkpoint continues"
    )
    assert "Traceback" not in done.stderr and not (OUT / "model.safetensors").exists()
    if number == signal.SIGINT:
        train_small(max_steps=4, save_strategy="no", resume_from_checkpoint="newest")
        assert json.loads((OUT / "train_results.json").read_text())["resumed_at_step"] == 2


def test_a_terminal_that_closes_costs_no_checkpoint(run: Run, tmp_path: Path) -> None:
    """Whatever is written to a terminal that is gone fails with EIO; so does what the signal's handler writes."""
    gone = "import os\nmaster, terminal = os.openpty()\nfor n in (1, 2): os.dup2(terminal, n)\nos.close(master)\n"
    assert stopped(run, signal.SIGHUP, before=gone).returncode == 129
    assert verify(tmp_path / "out" / "checkpoint-2").state["step"] == 2


def test_a_run_under_nohup_ignores_the_hangup(run: Run, tmp_path: Path) -> None:
    done = stopped(run, signal.SIGHUP, former=signal.SIG_IGN)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists() and not list((tmp_path / "out").glob("checkpoint-*"))


def test_ignored_signals_stay_ignored() -> None:
    former = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGTERM)
        assert stop.received is None and signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, former)


def test_a_hangup_sent_twice_ends_no_faster() -> None:
    """The kernel and the shell both send one."""
    former = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(StoppedBySignal) as end, StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received == signal.SIGHUP
            stop.end_run_if_asked(7)
    finally:
        signal.signal(signal.SIGHUP, former)
    assert end.value.exit_code == 129 and "after step 7" in str(end.value)


def test_asking_tells_of_a_signal() -> None:
    former = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with StopRequest() as stop:
            assert not stop.was_asked()
            stop.end_run_if_asked(1)
            signal.raise_signal(signal.SIGTERM)
            assert stop.was_asked() and stop.was_asked()
    finally:
        signal.signal(signal.SIGTERM, former)


def test_other_ranks_do_not_announce_the_end(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """tests/run/test_ending.py has several real ranks."""
    former = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            monkeypatch.setenv("WORLD_SIZE", "2")
            with StopRequest() as stop:
                signal.raise_signal(signal.SIGTERM)
                assert stop.was_asked()
            assert ("finishing the step" in capfd.readouterr().err) is (rank == "0")
    finally:
        signal.signal(signal.SIGTERM, former)


def test_a_second_signal_ends_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    former = signal.getsignal(signal.SIGTERM)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for what they start with &
    try:
        with pytest.raises(StoppedBySignal) as end, StopRequest() as stop:
            signal.raise_signal(signal.SIGTERM)
            assert stop.received == signal.SIGTERM
            assert "a second one ends at once" in capfd.readouterr().err
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, interrupt)
    assert end.value.exit_code == 130
    assert signal.getsignal(signal.SIGTERM) is former
