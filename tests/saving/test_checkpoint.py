"""Checkpoints: which ones count, what they are compared with, how they are hashed."""

import json
import os
import shutil
from dataclasses import replace

import pytest
from models import make_config
from small_runs import OUT, contents, steps_saved, train_small

import fullft.saving.checkpoint
import fullft.saving.files
from fullft.config.config import to_words
from fullft.errors import CheckpointError, OptionsError
from fullft.saving.checkpoint import list_checkpoints, verify
from fullft.saving.resuming import _changed_options

# ---------------------------------------------------------------------------------------------- which checkpoints


def test_compiled_layers_must_keep_their_recomputation() -> None:
    """What else is checkpointed may change at any time."""
    config = make_config(activation_checkpointing="full", compile="true")
    saved = to_words(config) | {"activation_checkpointing": "none", "offload": "none"}
    assert _changed_options(config, saved)[0] == "activation_checkpointing was none, is full"
    assert _changed_options(replace(config, compile="false"), saved | {"compile": "false"}) == []
    for same in ("auto", "selective"):  # the same graphs
        assert _changed_options(replace(config, activation_checkpointing=same), saved) == []
    # Streamed layers' graphs recompute nothing: the layers are called again.
    streamed, full = replace(config, offload="parameters=host"), saved | {"activation_checkpointing": "full"}
    assert _changed_options(streamed, full) == ["offload was none, is parameters=host"]
    assert _changed_options(replace(config, offload="optimizer=host"), full) == []


def test_resuming_an_older_checkpoint_deletes_later_ones(
    earlier: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(OUT / "checkpoint-2", OUT / "checkpoint-8")  # of another run
    (OUT / "checkpoint-8" / "notes.txt").write_text("mine")
    resumed = {"allow_changes": True, "save_total_limit": 1, "resume_from_checkpoint": OUT / "checkpoint-1"}
    train_small(**resumed, max_steps=3, save_steps=3)
    assert "checkpoint-8, checkpoint-2" in capsys.readouterr().out
    assert verify(OUT / "checkpoint-3").state["step"] == 3
    assert os.listdir(OUT / "checkpoint-8") == ["notes.txt"] and not (OUT / "checkpoint-2").exists()
    train_small(resume_from_checkpoint="newest", allow_changes=True, max_steps=3)
    assert json.loads((OUT / "train_results.json").read_text())["resumed_at_step"] == 3


def test_checkpoints_of_others_are_left_alone(earlier: dict[str, bytes]) -> None:
    theirs = {}
    for name in ("checkpoint-9/model.safetensors", "checkpoint-3/pytorch.bin", "checkpoint-4/model.safetensors"):
        theirs[OUT / name] = name
        (OUT / name).parent.mkdir()
        (OUT / name).write_text(name)
    (OUT / "checkpoint-9" / "manifest.json").write_text('{"sha256": ["../../x"]}')  # a manifest, but none of ours
    train_small(resume_from_checkpoint="newest", allow_changes=True, max_steps=4, save_steps=1, save_total_limit=1)
    assert steps_saved() == [9, 4, 3]
    assert verify(OUT / "checkpoint-4").state["step"] == 4
    with pytest.raises(CheckpointError, match="no checkpoint of this program"):
        verify(OUT / "checkpoint-9")
    # The name was taken by a file that is not ours: it has another name now.
    theirs[OUT / "checkpoint-4.old" / "model.safetensors"] = theirs.pop(OUT / "checkpoint-4" / "model.safetensors")
    assert all(file.read_text() == name for file, name in theirs.items())


# ---------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(("before", "after"), [("fp32", "bf16-true"), ("bf16-true", "bf16-mixed")])
def test_another_precision_is_refused_if_states_change(before: str, after: str) -> None:
    train_small(precision=before)
    kept = contents(OUT)
    with pytest.raises(CheckpointError, match=f"pass --precision {before}"):
        train_small(precision=after, resume_from_checkpoint="newest", allow_changes=True, max_steps=3)
    assert {name: data for name, data in contents(OUT).items() if name.startswith("checkpoint")} == {
        name: data for name, data in kept.items() if name.startswith("checkpoint")
    }


@pytest.mark.parametrize(
    ("shorter", "message"),
    [
        ({"max_steps": 1}, "checkpoint-2 has done 2 steps, and this run is to end after 1: raise --max_steps"),
        ({"max_steps": -1, "num_train_epochs": 1e-4}, "is to end after 1: raise --num_train_epochs"),
    ],
)
def test_a_run_shorter_than_its_checkpoint_is_refused(
    earlier: dict[str, bytes], shorter: dict[str, float], message: str
) -> None:
    with pytest.raises(OptionsError, match=message):
        train_small(**shorter, resume_from_checkpoint="newest", allow_changes=True)
    assert contents(OUT) == earlier
    # As long as it is enough, and so is an earlier checkpoint.
    train_small(resume_from_checkpoint="newest")
    assert json.loads((OUT / "train_results.json").read_text())["steps"] == 2
    train_small(**shorter, resume_from_checkpoint=OUT / "checkpoint-1", allow_changes=True)
    assert json.loads((OUT / "train_results.json").read_text())["steps"] == 1
    assert contents(OUT)["model.safetensors"] == earlier["checkpoint-1/model.safetensors"]


def test_another_batch_size_is_reported_to_repeat_rows(
    earlier: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    train_small(resume_from_checkpoint="newest", allow_changes=True, max_steps=3, gradient_accumulation_steps=2)
    said = capsys.readouterr().out
    assert "the first 2 steps took 2 sequences each, now it is 4: in this epoch some rows may repeat" in said
    train_small(resume_from_checkpoint="newest", allow_changes=True, max_steps=4, gradient_accumulation_steps=2)
    assert "rows may repeat" not in capsys.readouterr().out


def test_weights_and_states_are_hashed_while_written(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    of_file = fullft.saving.files.sha256
    for module in (fullft.saving.files, fullft.saving.checkpoint):
        monkeypatch.setattr(module, "sha256", lambda file: hashed.append(file.name) or of_file(file))
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
