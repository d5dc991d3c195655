"""Whole runs over ranks: the files are those of one process, and any number of ranks resumes them."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import Forked, Run
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

# Of the demo, which has dropout; one thread, since products of several round otherwise.
WORDS = (
    "--precision bf16-true --max_steps 6 --logging_steps 1 --save_strategy steps --save_steps 3 --save_total_limit 9 "
    "--eval_strategy steps --eval_steps 2 --compile false --fit off --output_dir"
).split()
StartRanks = Callable[..., list[Forked]]


def finish(ranks: list[Forked]) -> list[tuple[int | None, str, str]]:
    """Wait for all ranks, and return their exit codes and outputs."""
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    return [(rank.returncode, *output) for rank, output in zip(ranks, outputs, strict=True)]


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def one(tmp_path: Path, run: Run) -> Path:
    """A run of one process."""
    done = run(*WORDS, "one")
    assert done.returncode == 0, done.stderr
    return tmp_path / "one"


@pytest.mark.parametrize(("count", "stage"), [(2, "full"), (2, "optimizer"), (3, "gradients")])
def test_ranks_write_the_files_of_one_process(
    one: Path, tmp_path: Path, start_ranks: StartRanks, count: int, stage: str
) -> None:
    (first, *others) = finish(start_ranks(count, *WORDS, "many", "--shard", stage))
    assert first[0] == 0, first[2]
    assert all(each == (0, "", "") for each in others), others
    assert f"x {count} ranks" in first[1] and "it gives the same logits" in first[1]
    many = tmp_path / "many"
    for name in ("model.safetensors", "checkpoint-3/model.safetensors", "checkpoint-6/model.safetensors"):
        assert (one / name).read_bytes() == (many / name).read_bytes(), name
    for name in ("checkpoint-3/optimizer.safetensors", "checkpoint-6/optimizer.safetensors"):
        if count == 2:
            assert (one / name).read_bytes() == (many / name).read_bytes(), name
        # Cut into three, vectors have other tails, which torch's AdamW rounds otherwise.
        ours, theirs = load_file(many / name), load_file(one / name)
        moments = {key: tensor for key, tensor in theirs.items() if not key.endswith("remainder")}
        assert all(ours[key].allclose(tensor, rtol=1e-5, atol=1e-9) for key, tensor in moments.items())
    for ours, theirs in zip(log_of(many), log_of(one), strict=True):
        assert ours.keys() == theirs.keys()
        for name in {"loss", "grad_norm", "eval_loss", "num_tokens", "num_target_tokens"} & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name
    memory = json.loads((many / "memory.json").read_text())
    assert len(memory["ranks"]) == count and memory["ranks"][0] == memory["measured"]["peak_bytes"]
    assert memory["sent"]["planned"] == memory["sent"]["measured"] and sum(memory["sent"]["measured"].values()) > 0
    assert {file.name for file in one.iterdir()} == {file.name for file in many.iterdir()}


def test_any_number_of_ranks_resumes(one: Path, tmp_path: Path, run: Run, start_ranks: StartRanks) -> None:
    """On the same number the files are identical; on others the weights are."""
    assert all(code == 0 for code, *_ in finish(start_ranks(2, *WORDS, "two", "--shard", "full")))
    expected = load_file(one / "model.safetensors")
    for count, stage in ((1, "auto"), (2, "full"), (3, "gradients")):
        folder = tmp_path / f"resumed-{count}"
        shutil.copytree(tmp_path / "two", folder)
        shutil.rmtree(folder / "checkpoint-6")
        (folder / "model.safetensors").unlink()
        words = [*WORDS, folder.name, "--resume_from_checkpoint", "--shard", stage]
        if count == 1:
            done = run(*words)
            assert done.returncode == 0, done.stderr
        else:
            assert [code for code, *_ in finish(start_ranks(count, *words))] == [0] * count
        found = load_file(folder / "model.safetensors")
        assert all(found[name].equal(tensor) for name, tensor in expected.items()), count
        assert [record["step"] for record in log_of(folder) if "loss" in record] == [1, 2, 3, 4, 5, 6]
    for name in ("model.safetensors", "optimizer.safetensors", "trainer_state.json", "manifest.json"):
        ours, theirs = (tmp_path / run / "checkpoint-6" / name for run in ("two", "resumed-2"))
        if name not in ("trainer_state.json", "manifest.json"):  # the options have another output_dir
            assert ours.read_bytes() == theirs.read_bytes(), name


def test_a_signal_to_one_rank_stops_all(tmp_path: Path, start_ranks: StartRanks) -> None:
    """They stop after the same step, with a checkpoint, and the run can be resumed."""
    words = [*WORDS, "run", "--max_steps", "2000", "--save_strategy", "epoch", "--eval_strategy", "no"]
    ranks = start_ranks(2, *words)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 60
    while not (log.is_file() and log.read_text().count('"loss"') > 3) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(ranks[1].pid, signal.SIGTERM)
    (first, second) = finish(ranks)
    assert (first[0], second[0]) == (143, 143)
    assert first[2].count("error: stopped by SIGTERM after step") == 1 and "error" not in second[2]
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    steps = int(checkpoint.name.removeprefix("checkpoint-")) + 2
    resumed = [*WORDS, "run", "--max_steps", str(steps), "--resume_from_checkpoint", "--allow_changes"]
    assert [code for code, *_ in finish(start_ranks(2, *resumed))] == [0, 0]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("stage", ["none", "optimizer", "gradients", "full"])
def test_two_gpus_train_as_one(tmp_path: Path, run_cold: Run, stage: str) -> None:
    """Over NCCL, started as users start it; a GPU's sums differ in their order."""
    for name, words in (("one", []), ("two", ["--gpus", "2", "--shard", stage])):
        done = run_cold(*WORDS, name, *words)
        assert done.returncode == 0, done.stderr
    for ours, theirs in zip(log_of(tmp_path / "two"), log_of(tmp_path / "one"), strict=True):
        for name in {"loss", "eval_loss"} & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-2), name
    memory = json.loads((tmp_path / "two" / "memory.json").read_text())
    assert memory["planned"]["peak_bytes"] == memory["measured"]["peak_bytes"]
