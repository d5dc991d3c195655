"""What a run leaves on disk: nothing of others is lost, nothing half-written counts, and a failure costs nothing."""

import json
import os
import shutil
from collections import namedtuple
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import make_config
from safetensors.torch import load_file, save_file

import fullft.run.log
import fullft.saving.export
import fullft.saving.files
import fullft.saving.output_dir
import train
from fullft.config.config import to_yaml
from fullft.config.parse import parse_config
from fullft.config.steps import Calendar
from fullft.errors import CheckpointError, DiskError, NonFiniteError
from fullft.optim.adamw import AdamW
from fullft.saving.checkpoint import _changed_options, list_checkpoints, verify
from fullft.saving.files import write_tensors, write_text
from fullft.saving.output_dir import prepare_output_dir, recover

SMALL = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "val_size": 0,
    "max_steps": 2,
    "max_length": 64,
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_steps": 1,
    "output_dir": "out",
}
OUT = Path("out")
EXPLODES = {"learning_rate": 1e30, "warmup_steps": 0, "max_steps": 3}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each test."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps with checkpoint-1 and checkpoint-2."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    train_small(output_dir=folder, save_steps=1)
    return folder


@pytest.fixture
def earlier(finished: Path) -> dict[str, bytes]:
    """The same run in `out`: its files and their contents."""
    shutil.copytree(finished, OUT)
    return contents(OUT)


def train_small(**options: Any) -> None:
    train.main(parse_config([f"--{name}={value}" for name, value in (SMALL | options).items()]))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps() -> list[int]:
    return [int(folder.name.split("-")[1]) for folder in list_checkpoints(OUT)]


# ---------------------------------------------------------------------------------------------- which checkpoints


def test_compiled_layers_must_go_on_recomputing_what_they_did() -> None:
    """What else is checkpointed may change at any time."""
    config = make_config(activation_checkpointing="full", compile="true")
    saved = asdict(config) | {"activation_checkpointing": "none", "offload": "none"}
    assert _changed_options(config, saved)[0] == "activation_checkpointing was none, is full"
    assert _changed_options(replace(config, compile="false"), saved | {"compile": "false"}) == []
    for same in ("auto", "selective"):  # the same graphs
        assert _changed_options(replace(config, activation_checkpointing=same), saved) == []
    # Streamed layers' graphs recompute nothing: the layers are called again.
    streamed, full = replace(config, offload="parameters=host"), saved | {"activation_checkpointing": "full"}
    assert _changed_options(streamed, full) == ["offload was none, is parameters=host"]
    assert _changed_options(replace(config, offload="optimizer=host"), full) == []


def test_resuming_an_older_checkpoint_leaves_the_later_ones(
    earlier: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(OUT / "checkpoint-2", OUT / "checkpoint-8")  # of another course
    (OUT / "checkpoint-8" / "notes.txt").write_text("mine")
    resumed = {"allow_changes": True, "save_total_limit": 1, "resume_from_checkpoint": OUT / "checkpoint-1"}
    train_small(**resumed, max_steps=3, save_steps=3)
    assert "checkpoint-8, checkpoint-2" in capsys.readouterr().out
    assert verify(OUT / "checkpoint-3").state["step"] == 3
    assert os.listdir(OUT / "checkpoint-8") == ["notes.txt"] and not (OUT / "checkpoint-2").exists()
    train_small(resume_from_checkpoint="newest", allow_changes=True, max_steps=3)
    assert json.loads((OUT / "train_results.json").read_text())["resumed_at_step"] == 3


def test_folders_of_others_neither_count_nor_go(earlier: dict[str, bytes]) -> None:
    theirs = {}
    for name in ("checkpoint-9/model.safetensors", "checkpoint-3/pytorch.bin", "checkpoint-4/model.safetensors"):
        theirs[OUT / name] = name
        (OUT / name).parent.mkdir()
        (OUT / name).write_text(name)
    (OUT / "checkpoint-9" / "manifest.json").write_text('{"sha256": ["../../x"]}')  # a manifest, but none of ours
    train_small(resume_from_checkpoint="newest", allow_changes=True, max_steps=4, save_steps=1, save_total_limit=1)
    assert steps() == [9, 4, 3]
    assert verify(OUT / "checkpoint-4").state["step"] == 4
    with pytest.raises(CheckpointError, match="no checkpoint of this program"):
        verify(OUT / "checkpoint-9")
    # The name was taken by a file that is not ours: it is beside now.
    theirs[OUT / "checkpoint-4.old" / "model.safetensors"] = theirs.pop(OUT / "checkpoint-4" / "model.safetensors")
    assert all(file.read_text() == name for file, name in theirs.items())


def test_what_a_killed_save_leaves_is_put_right(earlier: dict[str, bytes]) -> None:
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
def test_a_run_that_fails_early_does_not_cost_the_earlier_one(
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
def test_the_earlier_run_is_put_back_on_the_way_out(
    fails: bool, earlier: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    config = parse_config([*options, "--overwrite_output_dir"])
    with pytest.raises(NonFiniteError):
        with prepare_output_dir(config, Calendar(config, steps_per_epoch=2), torch.nn.Linear(2, 2)):
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
        assert found["log.jsonl"] == b"new" and "config.json" not in found and steps() == [1]


def test_a_move_that_was_interrupted_is_undone(earlier: dict[str, bytes]) -> None:
    (OUT / ".replacing" / "checkpoint-2").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "checkpoint-2/manifest.json"):
        (OUT / name).rename(OUT / ".replacing" / name)
    recover(OUT)
    assert contents(OUT) == earlier and not list(OUT.glob(".*"))


@pytest.mark.parametrize("save_strategy", ["steps", "no"])
def test_a_run_with_something_to_show_replaces_the_earlier_one(save_strategy: str, earlier: dict[str, bytes]) -> None:
    train_small(overwrite_output_dir=True, max_steps=1, save_strategy=save_strategy)
    assert steps() == ([1] if save_strategy == "steps" else [])
    assert not list(OUT.glob(".*"))
    assert (OUT / "model.safetensors").read_bytes() != earlier["model.safetensors"]


def test_a_later_failure_keeps_the_new_checkpoint(earlier: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    hidden: list[list[Path]] = []  # once the checkpoint is there
    monkeypatch.setattr(fullft.run.log.Metrics, "checkpoint", lambda *_: hidden.append(list(OUT.glob(".*"))))
    with pytest.raises(NonFiniteError):
        train_small(overwrite_output_dir=True, **EXPLODES, save_steps=1)
    assert hidden == [[]]
    assert steps() == [1] and not (OUT / "model.safetensors").exists() and not list(OUT.glob(".*"))
    # Killed before the earlier run was discarded: it is what goes, not the new checkpoint.
    (OUT / ".replaced").mkdir()
    (OUT / ".replaced" / "model.safetensors").write_text("earlier")
    recover(OUT)
    assert steps() == [1] and not (OUT / "model.safetensors").exists() and not list(OUT.glob(".*"))


def test_the_earlier_run_counts_as_space_only_once_it_may_go(
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


# ---------------------------------------------------------------------------------------------- the final model


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


def test_a_model_that_is_half_written_does_not_load(earlier: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_model_is_not_reloaded_where_there_is_no_memory_for_it(
    earlier: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fullft.saving.export, "available_host_bytes", lambda: len(earlier["model.safetensors"]))
    train_small(resume_from_checkpoint="newest", save_steps=1)
    assert "not reloaded for a check" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- records


def test_a_picture_that_fails_hides_no_error_and_costs_no_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("no fonts")

    monkeypatch.setattr(fullft.run.log, "plot_loss", fail)
    with pytest.raises(NonFiniteError):
        train_small(**EXPLODES)
    assert "loss.png could not be drawn (ValueError: no fonts)" in capsys.readouterr().out
    shutil.rmtree(OUT)
    train_small()
    assert (OUT / "model.safetensors").exists()


def test_a_text_is_replaced_at_once_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(Path("log.jsonl"), "old")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError):
        write_text(Path("log.jsonl"), "new")
    assert Path("log.jsonl").read_text() == "old"


def test_the_written_config_does_not_ask_for_what_was_asked_once() -> None:
    config = parse_config(["--overwrite_output_dir", "--resume_from_checkpoint", "--allow_changes", "--debug"])
    Path("config.yaml").write_text(to_yaml(config))
    again = parse_config(["--config", "config.yaml"])
    assert not again.allow_changes and not again.debug and not again.overwrite_output_dir
    assert again.resume_from_checkpoint is None and again.learning_rate == config.learning_rate


# ---------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(("before", "after"), [("fp32", "bf16-true"), ("bf16-true", "bf16-mixed")])
def test_another_precision_is_refused_where_states_would_change(before: str, after: str) -> None:
    train_small(precision=before)
    kept = contents(OUT)
    with pytest.raises(CheckpointError, match=f"--precision {before}: pass that"):
        train_small(precision=after, resume_from_checkpoint="newest", allow_changes=True, max_steps=3)
    assert {name: data for name, data in contents(OUT).items() if name.startswith("checkpoint")} == {
        name: data for name, data in kept.items() if name.startswith("checkpoint")
    }


def test_another_batch_size_is_said_to_repeat_rows(
    earlier: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    train_small(resume_from_checkpoint="newest", allow_changes=True, max_steps=3, gradient_accumulation_steps=2)
    said = capsys.readouterr().out
    assert "the first 2 steps took 2 sequences each, now it is 4: in this epoch some rows may repeat" in said
    train_small(resume_from_checkpoint="newest", allow_changes=True, max_steps=4, gradient_accumulation_steps=2)
    assert "rows may repeat" not in capsys.readouterr().out


def test_weights_and_states_are_not_read_back_to_be_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    of_file = fullft.saving.checkpoint._sha256
    monkeypatch.setattr(fullft.saving.checkpoint, "_sha256", lambda file: hashed.append(file.name) or of_file(file))
    train_small()
    assert "config.json" in hashed and not [name for name in hashed if name.endswith(".safetensors")]
    (checkpoint,) = list_checkpoints(OUT)
    verify(checkpoint)
    assert [name for name in hashed if name.endswith(".safetensors")]
    with (checkpoint / "model.safetensors").open("r+b") as file:  # the negative control
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    with pytest.raises(CheckpointError, match="model.safetensors is damaged"):
        verify(checkpoint)


@pytest.mark.parametrize("is_direct", [True, False])
@pytest.mark.parametrize("block", [4096, 1 << 24])
def test_tensors_are_written_as_safetensors_writes_them(
    block: int, is_direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fullft.saving.files, "_BLOCK", block)
    if not is_direct:  # as where the file system cannot
        monkeypatch.setattr(fullft.saving.files, "set_direct", lambda *_: None)
    torch.manual_seed(0)
    shared = torch.arange(256, dtype=torch.float32)
    tensors = {
        "layer.weight.exp_avg": torch.randn(3, 5),
        "layer.weight.scale": torch.tensor(7.0),
        "a.codes": torch.randint(0, 255, (7,), dtype=torch.uint8),
        "b.remainder": torch.randint(-(2**15), 2**15, (9,), dtype=torch.int16),
        "b.moment": torch.randn(5, 3).bfloat16(),
        "c.count": torch.tensor(2**40),
        "d.empty": torch.empty(0, 4),
        "e.transposed": torch.randn(4, 6).t().contiguous(),
        "f.ünï": torch.randn(2).requires_grad_(),
        "g.many": torch.randn(3 * 4096 + 1),
    }
    digest = write_tensors(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert digest == fullft.saving.checkpoint._sha256(tmp_path / "ours")
    # Beyond what theirs accepts: shared memory and other strides.
    tensors |= {"h.shared": shared, "h.again": shared, "i": torch.randn(4, 6).t()}
    write_tensors(tmp_path / "ours", tensors)
    found = load_file(tmp_path / "ours")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
