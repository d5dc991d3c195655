"""Ranks: the few words that the processes that train one model exchange.

How they meet is in `run/joining.py`, and what moves weights and gradients between them in `transforms/sharding.py`. A
run on one device is a group of one: everything here then does nothing, or does what was asked at once.
"""

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fullft.config.config import Config
from fullft.config.ranks import find_place
from fullft.errors import DataError, as_user_error

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


def first_on_this_machine(work: Callable[[], Result]) -> Result:
    """Do something on every rank, but on the first of each machine before the others: it fills their caches.

    Args:
        work: called on every rank. What fails on a first rank ends the run, so that no other one waits for it.
    """
    if not dist.is_initialized():
        return work()
    is_local_first = find_place().local_rank == 0
    result = work() if is_local_first else None
    wait_for_all()
    return work() if not is_local_first else result  # type: ignore[return-value]


def in_turn(work: Callable[[], None]) -> None:
    """Do something on every rank, on each machine by one after the other: together they may need too much memory.

    Args:
        work: called on every rank, once.
    """
    place = find_place()
    for turn in range(max_over_ranks(place.local_count)):
        if turn == place.local_rank:
            work()
        wait_for_all()


def require_same(name: str, value: Any) -> None:
    """Check that all ranks have the same value.

    Args:
        name: what it is, for the message.
        value: picklable.

    Raises:
        DataError: on every rank, naming the first one that has another value than rank 0.
    """
    values = by_each_rank(lambda: value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise DataError(
                f"rank {rank} and rank 0 differ in {name}: {other!r} is not {values[0]!r}\n"
                "see whether all machines have the same files, and the same versions of libraries"
            )


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


def max_over_ranks(number: int) -> int:
    """Return the largest of all ranks' numbers. It does not wait for the device.

    Args:
        number: of this rank.
    """
    if not dist.is_initialized():
        return number
    largest = torch.tensor(number)  # on the CPU, and so by gloo
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def wait_for_all() -> None:
    """Return when every rank has come here. It does not wait for the device."""
    max_over_ranks(0)


def describe_ranks(config: Config) -> list[str]:
    """Say how many ranks there are, and what of them is of no use.

    Args:
        config: as the plan has decided.

    Returns:
        Lines; none for one rank that was not asked to share anything.
    """
    ranks, place = config.gpus, find_place()
    if ranks == 1:
        shares = config.shard in ("optimizer", "gradients", "full")
        return [f"--shard {config.shard} saves nothing: there is one rank"] if shares else []
    lines = [f"{ranks} ranks" + (f" on {place.machines} machines" if place.machines > 1 else "")]
    if config.micro_batch_tokens:
        return lines
    micro_batches = config.global_batch_size // config.per_device_train_batch_size
    rest = micro_batches % ranks
    if micro_batches < ranks:
        lines.append(
            f"{ranks - micro_batches} of {ranks} ranks have nothing to do in a step of {micro_batches} micro-batches: "
            "a larger --global_batch_size would use them"
        )
    elif rest:
        lines.append(
            f"{micro_batches} micro-batches a step do not divide by {ranks} ranks: {ranks - rest} of them wait for the "
            f"last micro-batch of the other{'s' if rest > 1 else ''}"
        )
    return lines
