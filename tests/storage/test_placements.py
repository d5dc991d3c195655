"""Offloading changes where bytes live and nothing else: each placement computes bitwise what the resident run does."""

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_config, optimizer_of
from torch import nn
from trajectories import PLACEMENTS, VOCABULARY, content, trajectory

from fullft.optim import adamw, adamw_8bit, gradients
from fullft.storage import tiers
from fullft.storage.disk import DiskArray
from fullft.storage.stream import ChunkStream


@pytest.fixture(autouse=True)
def chunks(small_chunks: int) -> int:
    """The largest tensors have six chunks: twice as many as are under way at a time."""
    assert 5 * small_chunks < VOCABULARY * 24 < 6 * small_chunks
    return small_chunks


# Each value of each with each of the others.
PAIRWISE = [(False, 1, 0.1), (True, 3, 0.1), (False, 3, 0.0), (True, 1, 0.0)]
REMAINING = [case for case in itertools.product((False, True), (1, 4), (0.0, 0.1)) if case not in PAIRWISE]
EACH_TIER = PLACEMENTS[:5]  # each thing in each tier, and both on disk
FORMATS = [
    {"precision": "fp32"},
    {"precision": "bf16-mixed"},
    {"master_weights": "none"},
    {"master_weights": "stochastic"},
]


@pytest.mark.parametrize(
    ("tied", "accumulation", "max_grad_norm"),
    [*PAIRWISE, *(pytest.param(*case, marks=pytest.mark.slow) for case in REMAINING)],
)
def test_every_placement_equals_the_resident_run_bitwise(
    tied: bool, accumulation: int, max_grad_norm: float, tmp_path: Path
) -> None:
    options = {"gradient_accumulation_steps": accumulation, "max_grad_norm": max_grad_norm}
    resident = trajectory(tmp_path, tied, **options)
    assert not max_grad_norm or min(resident.norms) > max_grad_norm  # clipping clips
    for placement in PLACEMENTS:
        assert trajectory(tmp_path, tied, **options, offload=placement) == resident, placement
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("accumulation", "options", "placements"),
    [
        (1, {"precision": "fp32"}, EACH_TIER),
        (3, {"precision": "bf16-mixed"}, EACH_TIER),
        (3, {"master_weights": "none"}, EACH_TIER),
        (1, {"master_weights": "stochastic"}, EACH_TIER),
        (3, {"master_weights": "stochastic"}, EACH_TIER),  # sums in fp32
        *(
            pytest.param(accumulation, options, PLACEMENTS, marks=pytest.mark.slow)
            for accumulation, options in itertools.product((1, 4), FORMATS)
        ),
    ],
    ids=lambda value: f"{len(value)} placements" if isinstance(value, list) else str(value),
)
def test_placements_equal_resident_runs_in_other_formats(
    accumulation: int, options: dict[str, str], placements: list[str], tmp_path: Path
) -> None:
    options = {**options, "gradient_accumulation_steps": accumulation}
    resident = trajectory(tmp_path, **options)
    for placement in placements:
        assert trajectory(tmp_path, **options, offload=placement) == resident, placement


def test_stochastic_rounding_depends_on_the_seed(tmp_path: Path) -> None:
    """The negative control."""
    resident = trajectory(tmp_path, master_weights="stochastic")
    assert trajectory(tmp_path, master_weights="stochastic", seed=43, offload="optimizer=host") != resident


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_released_gradients_equal_resident_ones_bitwise(tied: bool, tier: str, tmp_path: Path) -> None:
    resident = trajectory(tmp_path, tied, max_grad_norm=0.0)
    released = trajectory(tmp_path, tied, max_grad_norm=0.0, offload=f"gradients=released,optimizer={tier}")
    assert released == resident


def test_trajectories_of_other_decays_or_lengths_differ(tmp_path: Path) -> None:
    """The negative control of the comparison itself."""
    resident = trajectory(tmp_path, gradient_accumulation_steps=4)
    assert trajectory(tmp_path, gradient_accumulation_steps=4, adam_beta2=0.9) != resident
    assert len(trajectory(tmp_path, gradient_accumulation_steps=4, last=2).differing(resident)) == len(resident.tensors)


# ---------------------------------------------------------------------------------------------- 8 bits


class Matrix(nn.Module):
    """One matrix of two and a half chunks, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(809, 811, dtype=torch.bfloat16)


def matrix_trajectory(placement: str, max_norm: float, folder: Path) -> list[torch.Tensor]:
    """Take two steps of two micro-batches; return the states, the parameters and the norms."""
    model = Matrix()
    config = make_config(optim="adamw_8bit", offload=placement, output_dir=folder, learning_rate=1e-2)
    optimizer = optimizer_of(model, config)
    random = torch.Generator().manual_seed(1)
    norms = []
    for _ in range(2):
        for _ in range(2):
            inputs = torch.randn(2, 809, generator=random).bfloat16()
            (model.linear(inputs).float() ** 2).sum().backward()
        norms.append(optimizer.clip_gradients(max_norm))
        optimizer.step()
        optimizer.zero_grad()
    states = optimizer.states_of(model.linear.weight)
    assert states["exp_avg"].dtype == torch.uint8 and states["exp_avg_absmax"].numel() == 2563
    return [content(array) for array in states.values()] + [*model.parameters(), *norms]


@pytest.mark.parametrize(
    ("max_norm", "placements"),
    [
        (0.0, PLACEMENTS[::2]),
        (0.1, PLACEMENTS[1::2]),
        pytest.param(0.0, PLACEMENTS[1::2], marks=pytest.mark.slow),
        pytest.param(0.1, PLACEMENTS[::2], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_placements_with_8_bit_states_equal_resident_ones(
    max_norm: float, placements: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (adamw, gradients, tiers):
        monkeypatch.setattr(module, "CHUNK", 1 << 18)  # the scales of its blocks fill a page
    monkeypatch.setattr(adamw, "CPU_TILE", 1 << 16)
    monkeypatch.setattr(adamw_8bit, "TILE", 1 << 16)
    monkeypatch.setattr(adamw_8bit, "_compiled_update", lambda: adamw_8bit._update)  # compiling takes longer
    resident = matrix_trajectory("none", max_norm, tmp_path)
    for placement in placements:
        moved = matrix_trajectory(placement, max_norm, tmp_path)
        assert all(torch.equal(one, other) for one, other in zip(moved, resident, strict=True)), placement


# ---------------------------------------------------------------------------------------------- negative controls


def _no_way_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ChunkStream, "_take_back", lambda *_: None)


def _next_chunk(patch: pytest.MonkeyPatch) -> None:
    """Read what lies a chunk further on, where there is one."""
    read = DiskArray.read

    def wrong(self: DiskArray, start: int, count: int, target: torch.Tensor) -> None:
        is_there = start + 2 * tiers.CHUNK <= self.numel()
        read(self, start + tiers.CHUNK if is_there else start, count, target)

    patch.setattr(DiskArray, "read", wrong)


def _forgotten_sums(patch: pytest.MonkeyPatch) -> None:
    """Replace the sum by each micro-batch's gradient."""
    send = gradients._Sender.send
    patch.setattr(gradients._Sender, "send", lambda self, gradient, sums, _: send(self, gradient, sums, True))


def _early_norm(patch: pytest.MonkeyPatch) -> None:
    """Leave short last chunks out of the norm."""
    run = ChunkStream.run

    def shortened(self: ChunkStream, jobs: Any) -> Iterator[dict[str, torch.Tensor]]:
        for views in run(self, jobs):
            is_norm = views.keys() == {"gradient"}
            yield {"gradient": views["gradient"] * 0} if is_norm and views["gradient"].numel() < 4096 else views

    patch.setattr(ChunkStream, "run", shortened)


@pytest.mark.parametrize(
    ("break_it", "is_noticed"),
    [
        (_no_way_back, {"optimizer=host", "optimizer=disk"}),
        (_next_chunk, {"optimizer=disk", "gradients=disk"}),
        (_forgotten_sums, {"gradients=disk"}),  # on a CPU the host's sums need no sending
        (_early_norm, {"optimizer=host", "optimizer=disk", "gradients=host", "gradients=disk"}),
    ],
)
def test_mistakes_in_moving_change_the_trajectory(
    break_it: Callable[[pytest.MonkeyPatch], None],
    is_noticed: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resident = trajectory(tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.1)
    break_it(monkeypatch)
    for placement in itertools.islice(PLACEMENTS, 4):
        moved = trajectory(tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.1, offload=placement)
        assert (moved != resident) is (placement in is_noticed), placement
