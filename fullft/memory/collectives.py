"""Collectives, as the tracker sees them: what a rank sends to others, and where gathered weights come and go."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp  # noqa: F401 (which defines its operators)

from fullft.transforms.activation_checkpointing import tensors_in


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


# ---------------------------------------------------------------------------------------------- operators

_ALL_GATHER = torch.ops.c10d._allgather_base_.default
_REDUCE_SCATTER = torch.ops.c10d._reduce_scatter_base_.default
_ALL_REDUCE = torch.ops.c10d.allreduce_.default
_COLLECTING = torch.ops.fsdp.chunk_cat.default  # a unit's gradients, for reduce-scatter
# Operators that concern other ranks. The few numbers of the gradient norm are gathered by another one.
BETWEEN_RANKS = {_ALL_GATHER, _REDUCE_SCATTER, _ALL_REDUCE, _COLLECTING}
# In a ring of W ranks each one sends W - 1 of the W parts of the whole tensor; to sum on every rank, twice as many.
# Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms" (2009).
_ROUNDS = {_ALL_GATHER: ("all_gather", 1), _REDUCE_SCATTER: ("reduce_scatter", 1), _ALL_REDUCE: ("all_reduce", 2)}


def sent_by(operator: Any, arguments: Sequence[Any]) -> Sent:
    """Return what an operator sends.

    Args:
        operator: one of `BETWEEN_RANKS`.
        arguments: that it is called with.
    """
    if operator not in _ROUNDS:
        return Sent()
    kind, rounds = _ROUNDS[operator]
    group = next(each for each in arguments if isinstance(each, torch.ScriptObject))
    count = dist.ProcessGroup.unbox(group).size()
    whole = max(tensor.nbytes for tensor in tensors_in(arguments))
    return Sent(**{kind: rounds * (count - 1) * whole // count})


def gradients_in(operator: Any, arguments: Sequence[Any], named: Mapping[str, Any]) -> list[torch.Tensor]:
    """Return the gradients that an operator collects or sums.

    Args:
        operator: one of `BETWEEN_RANKS`.
        arguments: that it is called with.
        named: its arguments with a name.
    """
    return [] if operator is _ALL_GATHER else list(tensors_in((*arguments, *named.values())))


@contextmanager
def watching_resizes(seen: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Report each storage that is resized: FSDP so frees gathered weights, and makes room for them again.

    Args:
        seen: called with it afterwards.
    """
    resize = torch.UntypedStorage.resize_

    def watched(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        seen(storage)
        return result

    torch.UntypedStorage.resize_ = watched  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
