"""Packing: which documents share a sequence.

Owns the assignment alone; that packed documents do not see each other is arranged where micro-batches are made.
"""

import bisect
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assign documents to as few sequences as best-fit decreasing finds; no document is split.

    Each document, the longest first, goes where the least room would be left.

    Args:
        lengths: [documents], tokens of each, none above `capacity`.
        capacity: tokens of one sequence.

    Returns:
        The document indices of each sequence, in increasing order; sequences in the order of their first document.

    Source: D. S. Johnson, "Near-optimal bin packing algorithms" (1973): at most 11/9 of the optimum, plus one.
    """
    room: list[tuple[int, int]] = []  # (tokens left, sequence), sorted
    sequences: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        place = bisect.bisect_left(room, (lengths[index], -1))
        if place == len(room):
            left, sequence = capacity, len(sequences)
            sequences.append([])
        else:
            left, sequence = room.pop(place)
        sequences[sequence].append(index)
        bisect.insort(room, (left - lengths[index], sequence))
    return sorted(sorted(sequence) for sequence in sequences)
