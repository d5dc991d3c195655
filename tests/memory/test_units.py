"""Amounts are written in one unit."""

from fullft.memory.units import GIB, MIB, unit_for


def test_amounts_are_written_in_one_unit() -> None:
    assert unit_for(2**30) is GIB and unit_for(2**30 - 1) is MIB
    sizes = (0, 2**30, 150 * 2**30, -(2**41))
    assert [GIB.amount(size) for size in sizes] == ["0.00 GiB", "1.00 GiB", "150.0 GiB", "-2,048 GiB"]
