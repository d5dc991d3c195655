"""The log of a run."""

import shutil
from pathlib import Path

import pytest
from small_runs import EXPLODES, OUT, train_small

import fullft.run.records
from fullft.errors import NonFiniteError


def test_a_failing_picture_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise ValueError("no fonts")

    monkeypatch.setattr(fullft.run.records, "plot_loss", fail)
    with pytest.raises(NonFiniteError):
        train_small(**EXPLODES)
    assert "loss.png could not be drawn (ValueError: no fonts)" in capsys.readouterr().out
    shutil.rmtree(OUT)
    train_small()
    assert (OUT / "model.safetensors").exists()
