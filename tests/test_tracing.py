"""Tracing: tensors are fake inside, real afterwards, and some parts of a repetition stand for all."""

import pytest
import torch

from fullft.tracing import device_type, is_fake, is_tracing, standing_for_all, tracing


def test_tensors_are_fake_while_tracing() -> None:
    with tracing():
        assert is_tracing()
        inside = torch.ones(1 << 40)  # has no bytes
        assert is_fake(inside) and is_fake(inside + 1)
        assert inside.shape == (1 << 40,) and inside.dtype == torch.float32
    assert is_fake(inside)  # wherever the question is asked


def test_tensors_are_real_after_tracing() -> None:
    with tracing():
        torch.ones(3)
    assert not is_tracing()
    after = torch.ones(3)
    assert not is_fake(after) and after.sum().item() == 3


def test_device_is_the_planned_one_while_tracing() -> None:
    here = torch.device("cpu")
    with tracing("cuda"):
        assert device_type(torch.ones(1).device) == "cuda"
    with tracing():
        assert device_type(here) == "cpu"
    assert device_type(here) == "cpu" and device_type(torch.device("cuda")) == "cuda"


def test_real_tensors_may_be_read_while_tracing() -> None:
    """Code books of 8-bit moments are real."""
    real = torch.ones(3)
    with tracing():
        assert is_fake(real + 1) and not is_fake(real)


@pytest.mark.parametrize("parts", [range(5), [3, 1, 4, 1, 5], (2, 7, 1)])
def test_first_parts_stand_for_all_while_tracing(parts: range | list[int] | tuple[int, ...]) -> None:
    assert standing_for_all(parts) == standing_for_all(parts, 2) == parts
    with tracing():
        assert standing_for_all(parts) == parts[:1]
        assert standing_for_all(parts, 2) == parts[:2]
        assert standing_for_all(parts, 9) == parts
        assert len(standing_for_all(parts, 0)) == 0
    assert standing_for_all(parts) == parts


def test_exception_ends_tracing() -> None:
    with pytest.raises(ValueError, match="in the middle"), tracing():
        raise ValueError("in the middle")
    assert not is_tracing()
    assert not is_fake(torch.ones(3))
    assert standing_for_all([1, 2]) == [1, 2]


def test_nested_tracing_ends_with_the_outermost() -> None:
    with tracing():
        with tracing():
            assert is_tracing()
        assert is_tracing() and is_fake(torch.ones(3))
    assert not is_tracing() and not is_fake(torch.ones(3))
