"""Amounts of memory as people read them: one unit per text, chosen by what is largest in it.

Everywhere else bytes are integers.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """A unit of memory.

    Attributes:
        name: binary, as vendors of memory count: GiB or MiB.
        size: in bytes.
        decimal: its sibling, as vendors of disks count: GB or MB.
        decimal_size: in bytes.
    """

    name: str
    size: int
    decimal: str
    decimal_size: int

    def number(self, size: int) -> str:
        """Write an amount, precisely enough to compare, without the unit's name.

        Args:
            size: in bytes.
        """
        value = size / self.size
        digits = 2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0
        return f"{value:,.{digits}f}"

    def amount(self, size: int) -> str:
        """Write an amount with the unit's name.

        Args:
            size: in bytes.
        """
        return f"{self.number(size)} {self.name}"

    def legend(self) -> str:
        """Say what the names mean."""
        exponents = (30, 9) if self is GIB else (20, 6)
        return f"{self.name} = 2^{exponents[0]} bytes, {self.decimal} = 10^{exponents[1]}"


GIB, MIB = Unit("GiB", 2**30, "GB", 10**9), Unit("MiB", 2**20, "MB", 10**6)


def unit_for(size: int) -> Unit:
    """Choose the unit for a text.

    Args:
        size: the largest amount that matters in it, in bytes.
    """
    return GIB if size >= 2**30 else MIB
