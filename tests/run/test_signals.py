"""Signals: a run that is asked to stop saves what it has."""

import json
import signal
from pathlib import Path

import pytest
from fork_server import Run
from small_runs import OUT, SMALL, train_small, words_of

from fullft.errors import (
    StoppedBySignal,
)
from fullft.run.signals import StopRequest
from fullft.saving.checkpoint import verify

# A run of the miniature that gets a signal at the end of its second step.
STOPPED = """
import os, runpy, sys
from fork_server import ROOT
from fullft.run.log import Log
from small_runs import miniature

def step(log, number, *more):
    of_log(log, number, *more)
    if number == 2:
        os.kill(os.getpid(), SIGNAL)

of_log, Log.step = Log.step, step
sys.argv = ["train.py", *WORDS]
with miniature():
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_to_resume(
    number: signal.Signals, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"max_steps": 4, "save_strategy": "no"}
    words = words_of(SMALL | options)
    done = run("-c", STOPPED.replace("SIGNAL", str(int(number))).replace("WORDS", str(words)))
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
        train_small(**options, resume_from_checkpoint="newest")
        assert json.loads((OUT / "train_results.json").read_text())["resumed_at_step"] == 2


def test_a_second_signal_ends_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedBySignal) as end, StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        assert "a second one ends at once" in capfd.readouterr().err
        signal.raise_signal(signal.SIGINT)
    assert end.value.exit_code == 130
    assert signal.getsignal(signal.SIGTERM) is former
