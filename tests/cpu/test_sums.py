"""Sums in pieces are torch's sums, in an order that does not depend on the number of threads."""

import math

import pytest
import torch

from fullft.cpu.sums import TILE, add_, sum_in_order, sum_of_squares


def test_sum_in_order_does_not_depend_on_threads() -> None:
    """A model may have so many matrices of experts, and torch's threads share so long a sum."""
    scalars = list(torch.rand(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    ours, torchs = set(), set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        ours.add(sum_in_order(scalars).item())
        torchs.add(torch.stack(scalars).sum().item())
    assert len(ours) == 1 < len(torchs)
    assert ours.pop() == pytest.approx(math.fsum(scalars), rel=1e-13)


@pytest.mark.parametrize("count", [1, TILE, 2 * TILE + 3])
def test_narrow_values_are_added_as_torch_adds_them(count: int) -> None:
    torch.manual_seed(0)
    total, values = torch.randn(count), torch.randn(count).bfloat16()
    expected = total + values.float()
    add_(total, values)
    assert torch.equal(total, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_squares_are_summed_in_fp64(dtype: torch.dtype) -> None:
    values = torch.randn(TILE + 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert sum_of_squares(values).item() == pytest.approx(math.fsum(values.double().square().tolist()), rel=1e-14)
