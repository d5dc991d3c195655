"""The output folder: nothing of others is lost, and a run that fails costs nothing of the one before it."""

import os
import shutil
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import bf16_model, make_config
from small_runs import EXPLODES, OUT, SMALL, contents, steps_saved, train_small, words_of

import fullft.run.log
import fullft.saving.output_dir
from fullft.config.parse import parse_config
from fullft.config.steps import Steps
from fullft.errors import DiskError, NonFiniteError
from fullft.optim.adamw import AdamW
from fullft.saving.output_dir import prepare_output_dir, recover


def test_a_killed_save_is_put_right(earlier: dict[str, bytes]) -> None:
    (OUT / "checkpoint-2").rename(OUT / ".checkpoint-2.old")  # between the two renames
    shutil.copytree(OUT / "checkpoint-1", OUT / ".checkpoint-1.old")  # after the second one
    (OUT / ".checkpoint-1.old" / "notes.txt").write_text("mine")
    for folder in (".checkpoint-2.tmp", ".export.tmp", ".checkpoint-mine.tmp", ".cache"):
        (OUT / folder).mkdir()
        (OUT / folder / "file").write_text("half")
    (OUT / ".log.jsonl.tmp").write_text("half")
    recover(OUT)
    theirs = {".checkpoint-mine.tmp/file": b"half", ".cache/file": b"half", "checkpoint-1/notes.txt": b"mine"}
    assert contents(OUT) == earlier | theirs
    assert not list(OUT.glob(".checkpoint-[12]*"))


# ---------------------------------------------------------------------------------------------- the earlier run


@pytest.mark.parametrize("failure", ["in the first step", "before any checkpoint", "killed"])
def test_a_run_that_fails_early_spares_the_former(
    failure: str, earlier: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    (OUT / "checkpoint-1" / "notes.txt").write_text("mine")
    if failure == "in the first step":
        monkeypatch.setattr(AdamW, "clip_gradients", lambda *_, **__: torch.tensor(float("nan")))
    if failure == "killed":  # nothing is put back on the way out, as after SIGKILL
        monkeypatch.setattr(fullft.saving.output_dir.EarlierRun, "__exit__", lambda *_: None)
    with pytest.raises(NonFiniteError):
        train_small(overwrite_output_dir=True, **EXPLODES, save_steps=100)
    recover(OUT)
    found = contents(OUT)
    failed = {name for name in found if name.startswith(".failed-run")}
    assert ".failed-run/log.jsonl" in failed
    assert {name: found[name] for name in found.keys() - failed} == earlier | {"checkpoint-1/notes.txt": b"mine"}
    monkeypatch.undo()


@pytest.mark.parametrize("fails", [True, False])
def test_the_earlier_run_is_put_back_on_exit(
    fails: bool, earlier: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    config = parse_config([*words_of(SMALL), "--overwrite_output_dir"])
    with pytest.raises(NonFiniteError):
        with prepare_output_dir(config, Steps(config, steps_per_epoch=2), torch.nn.Linear(2, 2)):
            assert os.listdir(OUT) == [".replaced"]
            if not fails:
                shutil.copytree(OUT / ".replaced" / "checkpoint-1", OUT / "checkpoint-1")
            (OUT / "log.jsonl").write_text("new")
            raise NonFiniteError("no number")
    assert ("The earlier run's files are back in out" in capsys.readouterr().out) is fails
    found = contents(OUT)
    if fails:
        assert found.pop(".failed-run/log.jsonl") == b"new"
        assert found == earlier
    else:  # there is a new checkpoint: the earlier run has been replaced
        assert found["log.jsonl"] == b"new" and "config.json" not in found and steps_saved() == [1]


def test_an_interrupted_move_is_undone(earlier: dict[str, bytes]) -> None:
    (OUT / ".replacing" / "checkpoint-2").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "checkpoint-2/manifest.json"):
        (OUT / name).rename(OUT / ".replacing" / name)
    recover(OUT)
    assert contents(OUT) == earlier and not list(OUT.glob(".*"))


@pytest.mark.parametrize("save_strategy", ["steps", "no"])
def test_a_finished_run_replaces_the_earlier_one(save_strategy: str, earlier: dict[str, bytes]) -> None:
    train_small(overwrite_output_dir=True, max_steps=1, save_strategy=save_strategy)
    assert steps_saved() == ([1] if save_strategy == "steps" else [])
    assert not list(OUT.glob(".*"))
    assert (OUT / "model.safetensors").read_bytes() != earlier["model.safetensors"]


def test_a_later_failure_keeps_the_new_checkpoint(earlier: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    hidden: list[list[Path]] = []  # once the checkpoint is there
    monkeypatch.setattr(fullft.run.log.Log, "checkpoint", lambda *_: hidden.append(list(OUT.glob(".*"))))
    with pytest.raises(NonFiniteError):
        train_small(overwrite_output_dir=True, **EXPLODES, save_steps=1)
    assert hidden == [[]]
    assert steps_saved() == [1] and not (OUT / "model.safetensors").exists() and not list(OUT.glob(".*"))
    # Killed before the earlier run was discarded: it is what goes, not the new checkpoint.
    (OUT / ".replaced").mkdir()
    (OUT / ".replaced" / "model.safetensors").write_text("earlier")
    recover(OUT)
    assert steps_saved() == [1] and not (OUT / "model.safetensors").exists() and not list(OUT.glob(".*"))


def test_space_of_the_earlier_run_counts_once_replaced(
    earlier: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = sum(file.stat().st_size for file in (OUT / "checkpoint-1").iterdir())
    usage = namedtuple("usage", "free")
    for free, message in ((checkpoint // 2, "delete the earlier run"), (-10 * checkpoint, "save_total_limit 1")):
        there = SimpleNamespace(**vars(shutil) | {"disk_usage": lambda _, free=free: usage(free)})
        monkeypatch.setattr(fullft.saving.output_dir, "shutil", there)  # and not the plan's
        with pytest.raises(DiskError, match=message):
            train_small(overwrite_output_dir=True, max_steps=1)
        assert contents(OUT) == earlier


def test_space_is_asked_for_the_best_checkpoint_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a limit of 1 there are the newest, the best, and for a moment the next one: three, rather than two."""
    model = bf16_model("llama")
    weights = 2 * sum(parameter.numel() for parameter in model.parameters())
    checkpoint = weights + 5 * weights  # two fp32 moments and 16 bits of the master, per bf16 weight
    usage = namedtuple("usage", "free")
    there = SimpleNamespace(**vars(shutil) | {"disk_usage": lambda _: usage(int(2.5 * checkpoint))})
    monkeypatch.setattr(fullft.saving.output_dir, "shutil", there)
    for is_kept in (False, True):
        config = make_config(output_dir=OUT, max_steps=9, save_total_limit=1, load_best_model_at_end=is_kept)
        with pytest.raises(DiskError, match="2 checkpoints need") if is_kept else nullcontext():
            prepare_output_dir(config, Steps(config, steps_per_epoch=3), model)
