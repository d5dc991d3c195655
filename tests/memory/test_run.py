"""A run that cannot fit stops before its weights are loaded, and after those that are missing; what is recorded."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from models import make_config
from ranks import run_on_ranks
from worst_steps import deep

import fullft.memory.run
from fullft.config.ranks import find_place
from fullft.data.micro_batch import MicroBatch
from fullft.errors import MemoryExhaustedError
from fullft.memory.collectives import Sent
from fullft.memory.machine import Device, margin_bytes
from fullft.memory.plan import Batch, plan_step
from fullft.memory.profile import COMPONENTS, Moment, Profile
from fullft.memory.run import RunPlan, plan_run, record_memory


def small_run() -> Mock:
    """Make data of one row of 32 tokens."""
    ids = torch.ones(1, 32, dtype=torch.int64)
    lengths = [32] * 16
    train = Mock(lengths=lengths, steps_per_epoch=1, sequences_per_step=16, mean_length=32.0)
    train.find_dealings = lambda config: []
    run = Mock(train=train, evaluation=None, largest=lambda accumulation: ([MicroBatch.of(ids)] * accumulation, None))
    run.dealt = lambda config: run
    return run


def test_run_that_cannot_fit_stops_before_loading() -> None:
    model_config, cpu = deep("llama", 2), torch.device("cpu")
    config, data = make_config(precision="bf16-mixed", offload="none"), small_run()
    with pytest.raises(MemoryExhaustedError) as refusal:
        plan_run(replace(config, device_memory="512.5MiB"), model_config, data, cpu)
    assert refusal.value.exit_code == 8
    for part in ("512.5MiB card has 0.50 MiB", "MiB at its peak", "--precision bf16-true", "--fit off"):
        assert part in str(refusal.value)
    plan = plan_run(replace(config, device_memory="1GiB"), model_config, data, cpu)
    assert plan.config.activation_checkpointing == "none"
    assert plan.figures == plan_step(plan.config, model_config, Batch(1, 32))
    off = make_config(precision="bf16-mixed", device_memory="512.5MiB", fit="off")
    assert plan_run(off, model_config, data, cpu).figures == plan.figures


def test_first_rank_plans_for_the_rank_with_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks get the choice that fits the second one; only what to do in need each of them plans itself."""
    model_config = deep("llama", 5)
    alone = make_config(plan=True, gpus=2, shard="full", activation_checkpointing="none")
    peak = plan_step(alone, model_config, Batch(1, 32))["peak_bytes"]
    enough = peak + margin_bytes(peak)

    def plan() -> tuple[str, dict[str, Any] | None, int, str]:
        rank, planned = find_place().rank, []
        device = Device("mine", enough if rank == 1 else 2**40)
        monkeypatch.setattr("fullft.memory.run.find_device", lambda *_: device)
        monkeypatch.setattr("fullft.memory.choose.plan_step", lambda *args: (planned.append(args), plan_step(*args))[1])
        config = make_config(offload="none", activation_checkpointing="none")
        run = plan_run(config, model_config, small_run(), torch.device("cpu"))
        assert run.config.place.rank == run.config.group.index == rank and run.device.memory_bytes == enough
        return run.config.shard, run.figures, len(planned), run.advice()

    first, second = run_on_ranks(2, plan)
    assert first[:2] == second[:2] and first[0] == "full" and (first[1] or {})["peak_bytes"] == peak
    assert first[2] > 0 == second[2]
    assert first[3] == second[3] and "cheapest remedies: --" in first[3]


def test_resumed_ranks_keep_their_stage() -> None:
    """Another one would add up gradients in another order."""

    def stage_of(saved: dict[str, Any] | None) -> str:
        checkpoint: Any = saved and Mock(state={"options": saved})
        run = plan_run(make_config(offload="none"), deep("llama", 2), small_run(), torch.device("cpu"), checkpoint)
        return run.config.shard

    saved = [None, {"gpus": 2, "shard": "full"}, {"gpus": 4, "shard": "full"}, {"gpus": 2, "shard": "none"}]
    fastest, kept, other, none = run_on_ranks(2, lambda: [stage_of(each) for each in saved])[1]
    assert (kept, other, none) == ("full", fastest, "none") and fastest not in ("full", "none")


def test_memory_json_has_the_peaks_of_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fullft.memory.run, "plot_memory", lambda *_: (tmp_path / "memory.png").touch())

    def record() -> str:
        rank = find_place().rank
        config = make_config(output_dir=tmp_path if rank == 0 else Path("/none"))
        plan = RunPlan(config, None, Device("a card", 2**30), "")
        curves = {name: [7 + rank] for name in COMPONENTS}
        sent = (Sent(all_gather=3), Sent(reduce_scatter=5))
        profile = Profile([Moment(0, "forward", -1)], [700 + rank], curves, [], sent=sent)
        return record_memory(plan, profile, torch.device("cpu"))

    def written() -> dict[str, Any]:
        return dict(json.loads((tmp_path / "memory.json").read_text()))

    assert "Memory at the peak" in record() and "ranks" not in written()
    run_on_ranks(3, record)
    assert written()["ranks"] == [700, 701, 702] and written()["measured"]["peak_bytes"] == 700
    assert written()["sent"]["measured"]["reduce_scatter"] == 5
