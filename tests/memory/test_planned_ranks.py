"""The plan for several ranks gives, to the byte, what the tracker measures on them."""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from models import make_config, optimizer_of
from ranks import run_on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from worst_steps import model_of, worst_step

from fullft.memory import tracker
from fullft.memory import worst_step as worst_step_module
from fullft.memory.collectives import Sent, sent_in_step
from fullft.memory.plan import Batch, plan_step
from fullft.memory.planned_ranks import planned_ranks
from fullft.memory.profile import Profile
from fullft.model.probing import DOCUMENT, probe, probing
from fullft.storage.tiers import Storage
from fullft.transforms.sharding import apply_sharding

BATCH = Batch(2, 24, 16)
_HELD = 24  # bytes of the gradient norm, which a thread of gloo's may still hold in the step
STAGES = ("none", "optimizer", "gradients", "full")


class Case(NamedTuple):
    family: str
    options: dict[str, Any]


BY_STAGE = {stage: Case("llama", {"shard": stage}) for stage in STAGES}
# Each in two of the stages.
OTHERS: list[Case] = [
    Case("gpt2", {"precision": "bf16-mixed", "activation_checkpointing": "selective"}),
    Case("llama", {"gradient_accumulation_steps": 1}),
    Case("gpt2", {"activation_checkpointing": "full", "packing": True}),
    Case("gemma2", {"precision": "fp32", "activation_checkpointing": "every_2"}),
    Case("qwen2", {"precision": "bf16-mixed"}),
    Case("qwen2", {"offload": "optimizer=host,gradients=host"}),
    Case("llama", {"offload": "optimizer=disk,gradients=disk", "master_weights": "none"}),
    Case("qwen2", {"offload": "gradients=released", "gradient_accumulation_steps": 1, "max_grad_norm": 0.0}),
    Case("llama", {"optim": "adamw_8bit", "master_weights": "stochastic"}),
]
MORE = [
    Case(family, {**options, "shard": STAGES[(number + shift) % 4]})
    for number, (family, options) in enumerate(OTHERS)
    for shift in (1, 3)
]


def track(case: Case, folder: Path) -> tuple[dict[str, Any], dict[str, Any], Sent]:
    """Plan a case as a run does, and take its worst step; called on every rank.

    Returns:
        The plan's figures on the first rank, the tracker's, and what a step sends.
    """
    config = make_config(**case.options, output_dir=folder)
    model = model_of(case.family, config, tied=case.family == "qwen2")
    planned = plan_step(config, model.config, BATCH) if config.place.rank == 0 else {}
    storage = Storage(torch.device("cpu"), folder)
    apply_sharding(model, config, storage)
    with probing(model):  # as a run does before
        probe(model, DOCUMENT)
    optimizer = optimizer_of(model, config, storage)
    first, second = (worst_step(model, config, BATCH, optimizer=optimizer) for _ in range(2))
    return planned, least_of(first, second), sent_in_step(second.sent, config.gradient_accumulation_steps)


def least_of(first: Profile, second: Profile) -> dict[str, Any]:
    """Return the figures of two equal steps: a thread of gloo's at times keeps a buffer for some microseconds more."""

    def least(one: Any, other: Any) -> Any:
        if isinstance(one, dict):
            return {name: least(value, other[name]) for name, value in one.items()}
        return min(one, other)

    return dict(least(first.to_dict(), second.to_dict()))


def compare(ranks: int, cases: Sequence[Case], folder: Path, per_node: int | None = None) -> None:
    """Check each case's plan, one made in a run and one made without ranks."""
    local = {} if per_node is None else {"LOCAL_WORLD_SIZE": str(per_node)}
    first, *others = run_on_ranks(
        ranks, lambda: [track(case, folder) for case in cases], environment=local, seconds=300.0
    )
    for case, (planned, tracked, sent) in zip(cases, first, strict=True):
        for name, figures in tracked.items():
            held = figures if isinstance(figures, str) else pytest.approx(figures, abs=_HELD, rel=0)
            assert planned[name] == held, (case, name)
        assert planned["sent"] == asdict(sent), case
        if per_node is None:  # a plan without ranks has eight per node
            assert plan_alone(case, ranks) == planned, case
    for rank in others:
        for (_, tracked, _), (_, most, _) in zip(rank, first, strict=True):
            assert tracked["peak_bytes"] <= most["peak_bytes"]


def plan_alone(case: Case, ranks: int) -> dict[str, Any]:
    config = make_config(**case.options, gpus=ranks, plan=True)
    return plan_step(config, model_of(case.family, config, tied=case.family == "qwen2").config, BATCH)


def test_plan_of_ranks_equals_what_is_tracked(tmp_path: Path) -> None:
    compare(2, [BY_STAGE["full"], BY_STAGE["optimizer"]], tmp_path)


@pytest.mark.slow
def test_plan_of_other_cases_equals_what_is_tracked(tmp_path: Path) -> None:
    compare(2, [BY_STAGE["none"], BY_STAGE["gradients"], *MORE], tmp_path)


@pytest.mark.slow
def test_plan_of_uneven_rows_equals_what_is_tracked(tmp_path: Path) -> None:
    compare(3, [*BY_STAGE.values(), MORE[0]], tmp_path)


@pytest.mark.slow
def test_plan_of_hybrids_equals_what_is_tracked(tmp_path: Path) -> None:
    """Two machines of two ranks, which share a model within."""
    stages = [Case("llama", {"shard": stage, "shard_nodes": 1}) for stage in STAGES[1:]]
    compare(4, [*stages, Case("qwen2", {"shard": "full", "shard_nodes": 1, "precision": "fp32"})], tmp_path, per_node=2)


def test_plan_of_other_ranks_differs() -> None:
    """The negative control: each change shows, in the peak or in what is sent."""
    planned = plan_alone(BY_STAGE["full"], 2)
    for stage, ranks in (("full", 3), ("gradients", 2), ("optimizer", 2), ("none", 2)):
        changed = plan_alone(BY_STAGE[stage], ranks)
        assert changed["peak_bytes"] != pytest.approx(planned["peak_bytes"], rel=1e-2)
        assert changed["sent"] != planned["sent"]


@pytest.mark.parametrize("fault", ["resizes are not watched", "micro-batches are alike"])
def test_faults_of_tracking_show(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the tracker: without this the plan would be another one."""
    case = BY_STAGE["full" if fault.startswith("resizes") else "optimizer"]
    planned = plan_alone(case, 2)
    if fault.startswith("resizes"):
        monkeypatch.setattr(tracker, "watching_resizes", lambda _: nullcontext())
    else:
        monkeypatch.setattr(worst_step_module, "replace", lambda micro_batch, **_: micro_batch)
    assert plan_alone(case, 2)["peak_bytes"] != pytest.approx(planned["peak_bytes"], rel=1e-2)


# ---------------------------------------------------------------------------------------------- the ranks themselves


def test_planned_ranks_leave_nothing_behind() -> None:
    hook = sys.excepthook
    with planned_ranks(make_config(gpus=6, plan=True, shard="full")) as mesh:
        assert mesh is not None and mesh.shape == (6,) and dist.get_world_size(mesh.get_group(0)) == 6
    with planned_ranks(make_config(gpus=16, plan=True, shard="full", shard_nodes=1)) as mesh:
        assert mesh is not None and mesh.shape == (2, 8) and mesh.get_coordinate() == (0, 0)
    with planned_ranks(make_config()) as mesh:
        assert mesh is None
    assert sys.excepthook is hook and not dist.is_initialized()


def add_on_ranks(folder: Path) -> list[float]:
    """Let the first rank alone add something on planned ranks; then all add the same on real ones."""
    config = make_config(shard="full", output_dir=folder)
    if config.place.rank == 0:
        with planned_ranks(config) as planned:
            DTensor.from_local(torch.zeros(2), planned, (Shard(0),)) + 1
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))
    added = DTensor.from_local(torch.full((2,), float(config.place.rank)), mesh, (Shard(0),)) + 1
    summed = torch.ones(1)
    dist.all_reduce(summed, group=dist.new_group([0, 1]))
    return [*added.full_tensor().tolist(), summed.item()]


def test_planned_ranks_do_not_disturb_real_ones(tmp_path: Path) -> None:
    assert run_on_ranks(2, add_on_ranks, tmp_path) == [[1, 1, 2, 2, 2]] * 2


@pytest.mark.slow
def test_planned_ranks_with_real_names_would_disturb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: what PyTorch has cached sends to ranks that are not there."""
    monkeypatch.setattr("fullft.memory.planned_ranks._names", lambda: ("replicate", "shard"))
    with pytest.raises(RuntimeError, match="process group"):
        run_on_ranks(2, add_on_ranks, tmp_path)
