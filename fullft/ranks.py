"""Ranks: how the processes that train one model find each other, and the few words that they exchange.

What moves weights and gradients between them is in `transforms/sharding.py`. A run on one device is a group of one:
everything here then does nothing, or does what was asked at once.
"""

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fullft.config.ranks import find_place
from fullft.errors import as_user_error

Result = TypeVar("Result")


def is_first() -> bool:
    """Return whether this is the rank that writes and prints."""
    return find_place().rank == 0


def by_first_rank(work: Callable[[], Result]) -> Result:
    """Let the first rank do something; its result, or its error, reaches all ranks.

    Args:
        work: called on the first rank alone; what it returns must be picklable.
    """
    if not dist.is_initialized():
        return work()
    outcome = [_attempt(work) if is_first() else (None, None)]
    dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def by_each_rank(work: Callable[[], Result]) -> list[Result]:
    """Let every rank do its part; all results, or the error of the first rank that failed, reach all ranks.

    So no rank goes on, or waits, where another one has failed.

    Args:
        work: called on every rank; what it returns must be picklable.

    Returns:
        The results in the order of the ranks.
    """
    if not dist.is_initialized():
        return [work()]
    outcomes: list[_Outcome] = [(None, None)] * dist.get_world_size()
    mine = _attempt(work)
    dist.all_gather_object(outcomes, mine)
    outcomes[dist.get_rank()] = mine  # not a copy: it knows where it was raised
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return [result for result, _ in outcomes]


_Outcome = tuple[Any, Exception | None]


def _attempt(work: Callable[[], object]) -> _Outcome:
    try:
        return work(), None
    except Exception as error:
        return None, _portable(error)


def _portable(error: Exception) -> Exception:
    """Return an error as it can be sent: one that cannot would leave the other ranks waiting."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return as_user_error(error)
    return error


def sum_over_ranks(numbers: torch.Tensor) -> torch.Tensor:
    """Add numbers up over all ranks, in the order of the ranks and in fp64: every rank gets the same bits.

    Args:
        numbers: [n], or a scalar.

    Returns:
        float64, of the same shape; on one rank the numbers themselves.
    """
    return add_in_rank_order(numbers, None) if dist.is_initialized() else numbers


def add_in_rank_order(numbers: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Add numbers up over a group of ranks, as `sum_over_ranks` does.

    Args:
        numbers: [n], or a scalar.
        group: None for all ranks.
    """
    mine = numbers.detach().double()
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    return torch.stack(everyone).sum(dim=0)


def wait_for_all() -> None:
    """Return when every rank has come here."""
    if dist.is_initialized():
        dist.barrier()
