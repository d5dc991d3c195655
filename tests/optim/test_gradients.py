"""The norm of all gradients, clipping to it, and the sums over a step's micro-batches."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from fullft.cpu import reuse
from fullft.cpu.sums import ROW, TILE
from fullft.optim.adamw import AdamW
from fullft.optim.gradients import Gradients
from fullft.storage.tiers import Storage

CPU = torch.device("cpu")


def random_gradients(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    # The norm's tiles and rows, whole ones and cut ones.
    shapes = ((300, 70), (1,), (5, 3, 2), (1 << 20,), (0,), (ROW,), (TILE + 2 * ROW + 5,))
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def adamw(parameters: list[nn.Parameter]) -> AdamW:
    """AdamW whose moments have the weights' dtype; `exp_avg` after its first step is linear in the gradients."""
    groups = [{"params": parameters, "weight_decay": 0.1}]
    storage = Storage(CPU, Path())
    return AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, moments=lambda each: each.dtype, storage=storage)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norm_is_summed_in_fp64(dtype: torch.dtype) -> None:
    parameters = random_gradients(dtype)
    exact = math.sqrt(sum((parameter.grad.double() ** 2).sum().item() for parameter in parameters))
    norm = adamw(parameters).clip_gradients(max_norm=0)
    assert norm.dtype == torch.float64
    assert norm.item() == pytest.approx(exact, rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norm_does_not_depend_on_thread_count(dtype: torch.dtype) -> None:
    optimizer, norms = adamw(random_gradients(dtype)), set()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        norms.add(optimizer.clip_gradients(max_norm=0).item())
    assert len(norms) == 1


def test_norm_of_a_sample_reads_one_tile_each() -> None:
    parameter, other = nn.Parameter(torch.zeros(5 * TILE)), nn.Parameter(torch.zeros(3))
    for each in (parameter, other):
        each.grad = torch.ones_like(each)
    optimizer = adamw([parameter, other])
    assert optimizer.gradients.norm().item() ** 2 == pytest.approx(5 * TILE + 3)
    assert optimizer.gradients.norm(sample=[parameter]).item() ** 2 == pytest.approx(TILE)


def test_norm_without_gradients_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        adamw([nn.Parameter(torch.zeros(3))]).clip_gradients(max_norm=1.0)


# Wide for fp32 too: torch sums a million squares in fp32, and is off by 1e-5 itself.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_clipping_scales_as_torch_does(dtype: torch.dtype) -> None:
    ours, theirs = random_gradients(dtype), random_gradients(dtype)
    optimizer, torchs = adamw(ours), torch.optim.AdamW(theirs, fused=True)
    norm = optimizer.clip_gradients(max_norm=1.0)
    assert norm.item() == pytest.approx(nn.utils.clip_grad_norm_(theirs, max_norm=1.0).item(), rel=TOLERANCE[dtype])
    optimizer.step()
    torchs.step()
    for our, their in zip(ours, theirs, strict=True):
        found, expected = optimizer.states_of(our)["exp_avg"], torchs.state[their]["exp_avg"].flatten()
        torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=0)


def moments_after(parameters: list[nn.Parameter], max_norm: float) -> list[torch.Tensor]:
    optimizer = adamw(parameters)
    optimizer.clip_gradients(max_norm=max_norm)
    optimizer.step()
    return [optimizer.states_of(parameter)["exp_avg"] for parameter in parameters]


@pytest.mark.parametrize("max_norm", [0.0, 1e6])
def test_gradients_below_the_limit_stay_unchanged(max_norm: float) -> None:
    gradients = [parameter.grad for parameter in random_gradients()]
    for moment, gradient in zip(moments_after(random_gradients(), max_norm), gradients, strict=True):
        assert torch.equal(moment, torch.zeros_like(moment).lerp(gradient.flatten(), 1 - 0.9))
    assert not torch.equal(moment, moments_after(random_gradients(), 1.0)[-1])  # the negative control


def test_clipping_does_not_reach_the_next_step() -> None:
    """A step without `clip_gradients` before it takes the gradients as they are."""
    parameters = random_gradients()
    optimizer = adamw(parameters)
    optimizer.clip_gradients(max_norm=1e-3)
    optimizer.step()
    before = [optimizer.states_of(parameter)["exp_avg"].clone() for parameter in parameters]
    optimizer.step()
    for parameter, moment in zip(parameters, before, strict=True):
        expected = moment.lerp(parameter.grad.flatten(), 1 - 0.9)
        torch.testing.assert_close(optimizer.states_of(parameter)["exp_avg"], expected, rtol=1e-5, atol=1e-8)


def test_sums_hold_the_gradients_of_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reuse, "_LARGE", 1)
    monkeypatch.setattr(reuse, "_free", [])
    weight = torch.nn.Parameter(torch.zeros(300, 10, dtype=torch.bfloat16))
    sums = Gradients([weight], torch.float32, "device", Storage(CPU, tmp_path), use=lambda _: None)
    for _ in range(2):
        gradients = [torch.randn(300, 10, dtype=torch.bfloat16) for _ in range(3)]
        for gradient in gradients:
            (weight * gradient).sum().backward()
        total = sums.of(weight)
        assert isinstance(total, torch.Tensor)
        assert torch.equal(total.view(300, 10), torch.stack(gradients).float().cumsum(0)[-1])
        del total
        sums.clear()
        (memory,) = reuse._free  # of the sums; the next step reuses it
        memory.fill(255)
