"""The final model in the output folder."""

import os
from pathlib import Path
from typing import Any

import pytest
from small_runs import OUT, contents, train_small

import fullft.saving.export
from fullft.run.evaluation import Samples


def test_the_export_replaces_its_own_names_only(earlier: dict[str, bytes]) -> None:
    theirs = ["export/file", "model.safetensors.bak", "model-best-of-3.safetensors", "sub/model.safetensors"]
    stale = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    for name in theirs + stale:
        (OUT / name).parent.mkdir(exist_ok=True)
        (OUT / name).write_text("mine")
    train_small(resume_from_checkpoint="newest", save_steps=1)
    assert all((OUT / name).read_text() == "mine" for name in theirs)
    assert not any((OUT / name).exists() for name in stale) and not list(OUT.glob(".*"))
    assert contents(OUT)["model.safetensors"] == earlier["model.safetensors"]


def test_a_half_written_model_does_not_load(earlier: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    replace, moved = os.replace, []

    def stop_midway(source: Path, target: Path) -> None:
        if ".export.tmp" in str(source):
            moved.append(Path(target).name)
            if moved[-1] == "config.json":
                raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(fullft.saving.export.os, "replace", stop_midway)
    with pytest.raises(OSError):
        train_small(resume_from_checkpoint="newest", save_steps=1)
    assert "model.safetensors" in moved and moved[-1] == "config.json"
    assert not (OUT / "config.json").exists() and not list(OUT.glob(".*"))


def test_the_model_is_not_reloaded_without_memory(
    earlier: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fullft.saving.export, "available_host_bytes", lambda: len(earlier["model.safetensors"]))
    train_small(resume_from_checkpoint="newest", save_steps=1)
    assert "not reloaded for a check" in capsys.readouterr().out


def test_samples_that_fail_cost_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    complete = Samples.complete

    def fail(samples: Samples, *args: Any, after: bool) -> None:
        if after:
            raise RuntimeError("no kernel")
        complete(samples, *args, after=after)

    monkeypatch.setattr(Samples, "complete", fail)
    with pytest.raises(RuntimeError, match="no kernel"):
        train_small()
    assert {"model.safetensors", "config.json", "train_results.json"} <= set(os.listdir(OUT))
