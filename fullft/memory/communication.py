"""Communication: the bytes that a rank sends to others in a step, as collectives send them around a ring."""

from collections.abc import Sequence
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Sent:
    """Bytes that one rank sends, by kind of collective.

    Attributes:
        all_gather: weights, of which each rank has some rows.
        reduce_scatter: gradients, of which each rank gets the sums of its rows.
        all_reduce: gradients, of which each rank gets all sums.
    """

    all_gather: int = 0
    reduce_scatter: int = 0
    all_reduce: int = 0

    def __add__(self, other: "Sent") -> "Sent":
        """Add two parts of a step."""
        return Sent(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    def __mul__(self, times: int) -> "Sent":
        """Repeat a part of a step."""
        return Sent(*(getattr(self, each.name) * times for each in fields(self)))


def sent_in_step(micro_batches: Sequence[Sent], accumulation: int) -> Sent:
    """Add up what a step sends.

    Args:
        micro_batches: what the first and the last one send, or one that is like all others.
        accumulation: how many there are.
    """
    first, last = micro_batches[0], micro_batches[-1]
    if accumulation == 1:
        return last
    # Those between find what the last one finds, and leave what the first one leaves.
    between = Sent(last.all_gather, first.reduce_scatter, first.all_reduce)
    return first + between * (accumulation - 2) + last
