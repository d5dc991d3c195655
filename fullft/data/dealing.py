"""Dealing: which sequences of a step are computed together. It changes no gradient but by the order of sums.

A step's sequences are dealt into micro-batches by tokens, not by number: within one they lie behind each other, without
padding. The fewer micro-batches, the fewer times all weights are read and all gradients are added.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_COUNTS = (1, 2, 4, 8, 16)  # of a rank's micro-batches per step, among which a plan may choose
_STEPS_LOOKED_AT = 2000  # to find how many tokens a micro-batch needs


@dataclass(frozen=True)
class Dealing:
    """One way to deal every step of a run.

    Attributes:
        tokens: that a micro-batch has at most.
        micro_batches: that a rank has at most in a step.
    """

    tokens: int
    micro_batches: int


def deal(lengths: Sequence[int], most_tokens: int, ranks: int = 1) -> list[list[int]]:
    """Deal sequences evenly into as few micro-batches as they fit in, as many for each rank.

    Args:
        lengths: [sequences], tokens of each, none above `most_tokens`.
        most_tokens: of a micro-batch.
        ranks: that take turns at them, and wait for the largest in each turn.

    Returns:
        The sequences' indices, in the order of `lengths` within each micro-batch.
    """
    fewest = -(-sum(lengths) // (most_tokens * ranks)) * ranks
    for count in range(fewest, len(lengths), ranks):
        groups = deal_evenly(lengths, count)
        if max(sum(lengths[index] for index in group) for group in groups) <= most_tokens:
            return groups
    return [[index] for index in range(len(lengths))]


def deal_evenly(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Deal sequences into so many micro-batches of about as many tokens, none of them empty.

    Args:
        lengths: [sequences], tokens of each.
        count: of the micro-batches; at most one per sequence.

    Source: Graham, "Bounds on multiprocessing timing anomalies" (1969): the longest first, each to the least loaded.
    """
    groups: list[list[int]] = [[] for _ in range(count)]
    tokens = [0] * count
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        least = min(range(count), key=lambda number: (tokens[number], number))
        groups[least].append(index)
        tokens[least] += lengths[index]
    return [sorted(group) for group in groups]


def find_dealings(steps: Iterable[Sequence[int]], ranks: int, longest: int, largest_step: int) -> list[Dealing]:
    """List ways to deal, those of the fewest micro-batches first.

    Args:
        steps: the lengths of each step's sequences.
        ranks: that share a step out.
        longest: tokens of the longest sequence of the run.
        largest_step: tokens of the largest step of the run.
    """
    looked_at = [step for step, _ in zip(steps, range(_STEPS_LOOKED_AT), strict=False)]
    found: dict[int, Dealing] = {}
    for count in _COUNTS:
        if count == 1 and ranks == 1:
            tokens = largest_step
        else:
            tokens = max(_tokens_for(step, count * ranks) for step in looked_at)
        tokens = max(longest, tokens)
        found.setdefault(tokens, Dealing(tokens, most_micro_batches(looked_at, tokens, ranks)))
    return list(found.values())


def most_micro_batches(steps: Iterable[Sequence[int]], most_tokens: int, ranks: int) -> int:
    """Return how many micro-batches a rank has in a step, at most.

    Args:
        steps: the lengths of each step's sequences.
        most_tokens: of a micro-batch.
        ranks: that share a step out.
    """
    return max(-(-len(deal(step, most_tokens, ranks)) // ranks) for step in steps)


def _tokens_for(lengths: Sequence[int], count: int) -> int:
    """Return the tokens of the largest micro-batch where sequences are dealt evenly."""
    groups = deal_evenly(lengths, min(count, len(lengths)))
    return max(sum(lengths[i] for i in group) for group in groups)
