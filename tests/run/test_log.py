"""The log of a run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import make_config, tiny_model
from ranks import run_on_ranks
from small_runs import EXPLODES, OUT, train_small

import fullft.run.records
from fullft.config.steps import Steps
from fullft.errors import NonFiniteError
from fullft.run.log import Log
from fullft.saving.best import Exported


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


# ---------------------------------------------------------------------------------------------- several ranks


def log_of(folder: Path, first_step: int = 1) -> Log:
    config = make_config(output_dir=folder, logging_steps=1, max_steps=9)
    return Log(config, Steps(config, 9), tiny_model("llama"), mean_length=8.0, first_step=first_step)


def take_steps(log: Log, *losses: float) -> None:
    """Record steps of 100 tokens, each with the loss over all ranks and an evaluation."""
    for step, loss in enumerate(losses, start=log.first_step):
        log.require_finite(step, torch.tensor(loss / log.config.gpus), torch.tensor(2.0))
        log.step(step, learning_rate=0.1, num_tokens=100, num_target_tokens=50)
        log.evaluation(step, torch.tensor(loss - 1))


def test_ranks_know_one_log_and_the_first_writes_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Those of a resumed run, too, whatever the other ranks find in their folders."""

    def train(machine: str, first_step: int, *losses: float) -> tuple[list[dict[str, Any]], dict[int, float], Any]:
        with log_of(tmp_path / ("0" if dist.get_rank() == 0 else machine), first_step) as log:
            take_steps(log, *losses)
        return log.records, log.eval_losses, log.results(Exported(3, None))["first_loss"]

    (tmp_path / "0").mkdir()
    first, second = run_on_ranks(2, train, "1", 1, 4.0, 3.5)
    for (records, *rest), (others, *theirs) in ((first, second),):
        assert without_speed(records) == without_speed(others) and rest == theirs
    assert [record["loss"] for record in first[0] if "loss" in record] == [4.0, 3.5] and first[1] == {1: 3.0, 2: 2.5}
    assert not (tmp_path / "1").exists()
    files = {"config.yaml", "log.jsonl", "loss.png", "train_results.json"}
    assert {file.name for file in (tmp_path / "0").iterdir()} == files
    assert capfd.readouterr().err.count(" 0/9 ") == 1  # bar

    again = run_on_ranks(2, train, "1", 2, 3.0)
    for records, eval_losses, first_loss in again:
        assert [record["step"] for record in records] == [1, 1, 2, 2] and first_loss == 4.0
        assert eval_losses == {1: 3.0, 2: 2.0}
    lines = (tmp_path / "0" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == again[0][0]


def without_speed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: v for name, v in r.items() if name not in ("tokens_per_second", "memory_bytes")} for r in records]


def test_a_loss_that_is_not_finite_ends_all_ranks(tmp_path: Path) -> None:
    def train() -> str:
        with log_of(tmp_path) as log, pytest.raises(NonFiniteError) as error:
            loss = float("nan") if dist.get_rank() == 1 else 1.0
            log.require_finite(1, torch.tensor(loss), torch.tensor(2.0))
        return str(error.value)

    first, second = run_on_ranks(2, train)
    assert first == second and "the loss is nan" in first


def test_speed_is_of_all_ranks_and_mfu_of_each(tmp_path: Path) -> None:
    def train() -> dict[str, Any]:
        with log_of(tmp_path) as log:
            log.peak_flops = 1e12
            take_steps(log, 4.0)
        return {"flops": log.flops_per_token, **log.records[0]}

    for count in (1, 2):
        (record, *_) = run_on_ranks(count, train)
        mfu = record["tokens_per_second"] * record["flops"] / 1e12 / count
        assert record["mfu"] == pytest.approx(mfu, rel=1e-12) and record["mfu"] > 0
