"""Sharded over ranks, a run computes what it computes on one device."""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from sharded_runs import STAGES, Course, Run, each_rank_takes, take_steps
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from trajectories import PLACEMENTS

from fullft.model.probing import DOCUMENT, probe, probing
from fullft.storage.tiers import local_of
from fullft.transforms.sharding import Sharding

DOUBLE = torch.float64
pytestmark = pytest.mark.slow  # all but one case of each kind


def compare(ranks: int, cases: list[tuple[Any, ...]], per_node: int | None = None) -> list[tuple[Course, Course]]:
    """Return each case's course on one device, and over ranks, which all see the same."""
    pairs = []
    for case, courses in zip(cases, each_rank_takes(ranks, cases, per_node), strict=True):
        family, options, *rest = case
        ours = ("shard", "shard_nodes", "offload", "gradient_accumulation_steps")
        alone = {name: value for name, value in options.items() if name not in ours}
        assert all(course.losses == courses[0].losses and course.norms == courses[0].norms for course in courses)
        assert all(course.has_same_weights(courses[0]) for course in courses)
        pairs.append((take_steps(family, {**alone, "gpus": 1}, *rest), courses[0]))
    return pairs


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_computes_the_same(ranks: int) -> None:
    """In float64, with odd sizes, uneven micro-batches, ranks without targets or rows; with dropout in GPT-2."""
    modes = ("none", "selective", "full", "every_2")
    cases = [
        (
            family,
            {"gpus": ranks, "precision": "fp32", "shard": stage, "activation_checkpointing": mode},
            2,
            count,
            DOUBLE,
        )
        for family, (stage, mode, count) in itertools.product(
            ("llama", "tied", "gpt2"),
            [*zip(STAGES, modes, (5, 1, 8, 5), strict=True), *zip(STAGES, modes[::-1], (1, 5, 5, 8), strict=True)],
        )
    ]
    for case, (alone, together) in zip(cases, compare(ranks, cases), strict=True):
        assert together.distance(alone) < 1e-10, case


def test_hybrids_compute_the_same() -> None:
    """Two machines of two ranks each: shared out within a machine, copied across."""
    cases: list[tuple[Any, ...]] = [
        ("llama", {"gpus": 4, "precision": "fp32", "shard": stage, "shard_nodes": 1}, 2, 5, DOUBLE)
        for stage in ("optimizer", "gradients", "full")
    ]
    cases.append(("tied", {"gpus": 4, "shard": "full", "shard_nodes": 1}, 4))
    *exact, (alone, together) = compare(4, cases, per_node=2)
    assert all(course.distance(other) < 1e-10 for other, course in exact)
    assert together.has_same_weights(alone)


def test_split_masters_keep_their_bits() -> None:
    """In bf16 the weights are those of one device to the bit, wherever states and gradients live."""
    cases: list[tuple[Any, ...]] = [
        (family, {"gpus": 2, "shard": stage}, 6) for family in ("llama", "tied") for stage in STAGES
    ]
    cases += [
        ("llama", {"gpus": 2, "shard": stage, "offload": offload}, 3)
        for stage, offload in zip(STAGES[1:] * len(PLACEMENTS), PLACEMENTS * 3, strict=True)
    ]
    released = {"gpus": 2, "shard": "full", "max_grad_norm": 0.0, "offload": "gradients=released"}
    cases.append(("llama", {**released, "gradient_accumulation_steps": 1}, 4, 2))
    for case, (alone, together) in zip(cases, compare(2, cases), strict=True):
        assert together.has_same_weights(alone), case
        assert together.losses == pytest.approx(alone.losses, rel=1e-6), case


def test_other_precisions_agree_up_to_the_order_of_sums() -> None:
    """Under autocast a sum's last bit may round a weight's copy the other way, and learning here is very fast."""
    exact: list[tuple[Any, ...]] = [
        ("wide", {"gpus": 2, "shard": stage, "optim": "adamw_8bit"}, 3, 5, None, has_8_bits) for stage in STAGES[1:]
    ]
    cases: list[tuple[Any, ...]] = [
        *exact,
        *(("llama", {"gpus": 2, "shard": stage, "precision": "fp32"}, 3) for stage in STAGES[1:]),
        *(("llama", {"gpus": 2, "shard": stage, "precision": "bf16-mixed"}, 3) for stage in STAGES[1:]),
        ("llama", {"gpus": 2, "shard": "full", "precision": "fp32", "compile": "true"}, 2, 2),
    ]
    for case, (alone, together) in zip(cases, compare(2, cases), strict=True):
        bound = 1e-4 if case[1].get("precision") == "bf16-mixed" else 1e-6
        assert together.losses == pytest.approx(alone.losses, rel=bound), case
        assert case not in exact or together.has_same_weights(alone), case


def has_8_bits(run: Run) -> None:
    states = (state for parameter in run.optimizer.parameters for state in run.optimizer.states_of(parameter).values())
    assert torch.uint8 in {state.dtype for state in states}


@pytest.mark.parametrize("fault", ["rounded sums", "divided sums", "sums of one rank", "dropout by rank"])
def test_faults_show(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative controls: each of these makes another run, and the comparison sees it."""
    if fault == "rounded sums":  # as torch does by itself
        monkeypatch.setattr(Sharding, "before_backward", _without_wide_sums)
    if fault == "divided sums":
        monkeypatch.setattr(FSDPModule, "set_gradient_divide_factor", lambda *_: None)
    if fault == "sums of one rank":
        monkeypatch.setattr("fullft.optim.gradients.add_in_rank_order", lambda total, group: total)
    if fault == "dropout by rank":
        monkeypatch.setattr("fullft.data.micro_batch._seed_of", lambda seed, step, number: dist.get_rank())
    family = "gpt2" if fault == "dropout by rank" else "llama"
    options = {"gpus": 2, "shard": "full", "precision": "bf16-true" if fault == "rounded sums" else "fp32"}
    (courses,) = each_rank_takes(2, [(family, options, 3)])
    monkeypatch.undo()
    alone = take_steps(family, {**options, "gpus": 1}, 3)
    assert courses[0].distance(alone) > 1e-4


def _without_wide_sums(self: Sharding, is_last: bool) -> None:
    """Leave out what keeps sums in fp32."""
    for unit in self._units:
        for group in unit._get_fsdp_state()._fsdp_param_groups:
            group._orig_dtype = torch.bfloat16
            for each in group.fsdp_params:
                each.sharded_param.grad_dtype = torch.bfloat16


def test_after_any_forward_a_rank_has_its_rows_alone() -> None:
    """Evaluation, probes and generation gather weights; afterwards none is left, and training goes on as ever."""

    def look_and_probe(run: Run) -> None:
        with probing(run.model):
            logits = probe(run.model, DOCUMENT)
            generated = run.model.generate(torch.tensor([DOCUMENT[:5]]), max_new_tokens=4, do_sample=False)
        assert logits.shape == (len(DOCUMENT), 101) and generated.shape[1] <= 9
        assert all(isinstance(parameter, DTensor) for parameter in run.model.parameters())
        held = sum(local_of(parameter).numel() for parameter in run.model.parameters())
        assert held < 0.6 * sum(parameter.numel() for parameter in run.model.parameters())

    def work() -> list[tuple[Course, Course]]:
        return [
            (take_steps("tied", options), take_steps("tied", options, 3, 5, None, look_and_probe))
            for options in ({"gpus": 2, "shard": stage} for stage in STAGES[1:])
        ]

    for undisturbed, disturbed in run_on_ranks(2, work)[0]:
        assert disturbed.distance(undisturbed) == 0


def test_one_device_needs_no_sharding() -> None:
    run = take_steps("llama", {"shard": "full", "gpus": 1}, 1)
    assert run.has_same_weights(take_steps("llama", {}, 1))
