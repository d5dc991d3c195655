"""The best checkpoint: what `--load_best_model_at_end` exports, keeps and finds again."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import bf16_model, make_config
from small_runs import OUT, contents, steps_saved, train_small
from transformers.trainer_utils import rotate_checkpoints

import fullft.saving.best
import train
from fullft.config.config import Config
from fullft.errors import CheckpointError
from fullft.model.load import reload_weights
from fullft.saving.best import BestCheckpoint
from fullft.saving.checkpoint import _surplus, verify
from fullft.saving.weights import save_weights

OVERFITS = {0: 3.0, 1: 2.5, 2: 2.0, 3: 2.25, 4: 2.125}  # held-out loss by step: the best is step 2
LEARNS = {0: 3.0, 1: 2.5, 2: 2.0, 3: 1.75, 4: 1.5}
BEST = {
    "max_steps": 4,
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "val_size": 0.01,
    "save_total_limit": 9,
    "load_best_model_at_end": True,
}


def train_to(losses: dict[int, float], **options: Any) -> None:
    """Train the miniature, with given held-out losses in place of those that it has."""
    resumed = options.pop("first", 0)
    coming = iter([losses[step] for step in sorted(losses) if step >= resumed])
    evaluate = train.evaluate

    def given(*arguments: Any) -> torch.Tensor:
        evaluate(*arguments)  # which leaves layers on the device, where they are streamed
        return torch.tensor(next(coming))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate", given)
        train_small(**BEST | options)


def results() -> dict[str, Any]:
    return dict(json.loads((OUT / "train_results.json").read_text()))


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


# ---------------------------------------------------------------------------------------------- what is exported


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "fp32"},
        {"precision": "bf16-true", "offload": "parameters=host,optimizer=disk"},
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                {"precision": "bf16-true", "offload": "optimizer=host"},
                {"precision": "bf16-true", "offload": "parameters=disk,optimizer=disk,gradients=host"},
                {"precision": "bf16-true", "master_weights": "stochastic", "activation_checkpointing": "full"},
                {"precision": "bf16-mixed", "optim": "adamw_8bit"},
            )
        ),
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_the_best_weights_are_exported(options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    train_to(OVERFITS, **options)
    assert weights(OUT) == weights(OUT / "checkpoint-2") != weights(OUT / "checkpoint-4")
    said = capsys.readouterr().out
    assert said.count("best checkpoint: step 2, held-out loss 2.0000\n") == 1
    assert "reloaded, it gives the same logits" in said  # as the model that stands in memory
    assert "held-out loss 3.0000 -> 2.0000 (exported: step 2)" in said.splitlines()[-1]
    assert (results()["steps"], results()["exported_step"], results()["eval_loss_after"]) == (4, 2, 2.0)
    assert "held-out loss 2.0000 (before: 3.0000)" in (OUT / "README.md").read_text()
    assert "these are the weights of step 2" in (OUT / "README.md").read_text()


def test_without_the_option_the_last_weights_are_exported(capsys: pytest.CaptureFixture[str]) -> None:
    """The negative control."""
    train_to(OVERFITS, load_best_model_at_end=False)
    assert weights(OUT) == weights(OUT / "checkpoint-4") != weights(OUT / "checkpoint-2")
    assert "best" not in capsys.readouterr().out and "these are the weights" not in (OUT / "README.md").read_text()
    assert (results()["exported_step"], results()["eval_loss_after"]) == (4, 2.125)
    assert verify(OUT / "checkpoint-4").state["best"] is None


def test_last_weights_that_are_the_best_are_not_reloaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fullft.saving.best, "reload_weights", lambda *_: pytest.fail("reloaded"))
    train_to(LEARNS)
    assert "best checkpoint: step 4, held-out loss 1.5000" in capsys.readouterr().out
    assert weights(OUT) == weights(OUT / "checkpoint-4") and results()["exported_step"] == 4


def test_only_saved_steps_can_be_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    """Step 1 is the lowest, but has no checkpoint; of equals the first one counts."""
    train_to({0: 3.0, 1: 1.0, 2: 2.0, 3: 1.5, 4: 2.0}, save_steps=2)
    line = "best checkpoint: step 2, held-out loss 2.0000 (step 1, with 1.0000, has no checkpoint)\n"
    assert line in capsys.readouterr().out
    assert weights(OUT) == weights(OUT / "checkpoint-2") and results()["exported_step"] == 2


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mixtral"])
def test_reloaded_weights_are_those_that_were_saved(family: str, tmp_path: Path) -> None:
    """Tied ones too, and those that transformers converts."""
    model = bf16_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_weights(model, tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(1)
    assert not any(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    memory = [parameter.data_ptr() for parameter in model.parameters()]
    reload_weights(make_config(model=str(tmp_path)), model, tmp_path)
    assert [name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)] == []
    assert [parameter.data_ptr() for parameter in model.parameters()] == memory


# ---------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize(
    ("losses", "limit", "kept"),
    [
        (OVERFITS, 1, [4, 2]),
        (OVERFITS, 2, [4, 2]),
        (OVERFITS, 3, [4, 3, 2]),
        (LEARNS, 1, [4]),
        (LEARNS, 2, [4, 3]),
    ],
)
def test_the_best_checkpoint_is_never_deleted(losses: dict[int, float], limit: int, kept: list[int]) -> None:
    train_to(losses, save_total_limit=limit)
    assert steps_saved() == kept
    assert weights(OUT) == weights(OUT / f"checkpoint-{2 if losses is OVERFITS else 4}")


def test_what_is_deleted_is_what_the_trainer_deletes(tmp_path: Path) -> None:
    """For every number of checkpoints, every limit and every place of the best one."""
    tried = 0
    for number, limit in itertools.product(range(1, 6), range(1, 6)):
        for best in (None, *range(1, number + 1)):
            ours, theirs = tmp_path / "ours", tmp_path / "theirs"
            for folder, step in itertools.product((ours, theirs), range(1, number + 1)):
                (folder / f"checkpoint-{step}").mkdir(parents=True)
                (folder / f"checkpoint-{step}" / "manifest.json").write_text('{"sha256": {}}')
            rotate_checkpoints(
                str(theirs),
                save_total_limit=limit,
                best_model_checkpoint=None if best is None else str(theirs / f"checkpoint-{best}"),
            )
            config = make_config(output_dir=ours, save_total_limit=limit)
            noted = None if best is None else {"checkpoint": f"checkpoint-{best}"}
            for folder in _surplus(config, number, noted):
                shutil.rmtree(folder)
            assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}, (number, limit)
            tried += 1
            shutil.rmtree(tmp_path)
    assert tried == 5 * sum(number + 1 for number in range(1, 6))


# ---------------------------------------------------------------------------------------------- resuming


@pytest.fixture
def interrupted() -> None:
    """A run of three steps out of four: checkpoints 2, the best, and 3."""
    train_to(OVERFITS, max_steps=3, save_total_limit=1)
    assert steps_saved() == [3, 2]


def resume(**options: Any) -> None:
    train_to(
        OVERFITS,
        **{"resume_from_checkpoint": "newest", "allow_changes": True, "save_total_limit": 1, "first": 4} | options,
    )


def test_the_best_checkpoint_outlives_a_resume(interrupted: None) -> None:
    assert verify(OUT / "checkpoint-3").state["best"] == {"checkpoint": "checkpoint-2", "step": 2, "eval_loss": 2.0}
    (OUT / "log.jsonl").unlink()  # the checkpoint alone must do
    resume()
    assert steps_saved() == [4, 2] and weights(OUT) == weights(OUT / "checkpoint-2")
    assert results()["exported_step"] == 2 and results()["eval_loss_after"] == 2.0


def test_the_best_checkpoint_may_be_in_another_folder(interrupted: None) -> None:
    before = contents(OUT)
    resume(resume_from_checkpoint=OUT / "checkpoint-3", output_dir="new")
    assert contents(OUT) == before and weights(Path("new")) == weights(OUT / "checkpoint-2")
    assert verify(Path("new/checkpoint-4")).state["best"]["checkpoint"] == str((OUT / "checkpoint-2").resolve())
    resume(output_dir="new", first=5)  # from there on, too
    assert weights(Path("new")) == weights(OUT / "checkpoint-2")


def test_a_best_checkpoint_that_is_gone_is_refused(interrupted: None) -> None:
    shutil.rmtree(OUT / "checkpoint-2")
    before = contents(OUT)
    with pytest.raises(CheckpointError, match=r"checkpoint-2 \(held-out loss 2.0000\), is gone: put it back"):
        resume()
    assert contents(OUT) == before
    resume(load_best_model_at_end=False)
    assert weights(OUT) == weights(OUT / "checkpoint-4")


def test_a_damaged_best_checkpoint_is_not_exported(interrupted: None) -> None:
    file = OUT / "checkpoint-2" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="model.safetensors is damaged.*\n.*--load_best_model_at_end false"):
        resume()
    assert steps_saved() == [4, 2]  # the last weights are not lost
    resume(load_best_model_at_end=False, first=5)
    assert weights(OUT) == weights(OUT / "checkpoint-4")


def test_the_option_may_come_after_the_run() -> None:
    """A run that has overfitted is asked for its best weights, of the checkpoints that there are."""
    train_to(OVERFITS, load_best_model_at_end=False)
    resume(first=5, save_total_limit=9)
    assert weights(OUT) == weights(OUT / "checkpoint-2") and results()["exported_step"] == 2


def test_without_any_held_out_loss_it_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    config: Config = make_config(output_dir=OUT, load_best_model_at_end=True)
    best = BestCheckpoint(config, None)
    assert best.including(1, {0: 2.0}) is None
    exported = best.load(bf16_model("llama"), 1, {0: 2.0})
    assert (exported.step, exported.eval_loss) == (1, None)
    assert "warning: no checkpoint has a held-out loss: the last weights are exported" in capsys.readouterr().out
