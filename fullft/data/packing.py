"""Packing: which documents share a sequence. Positions that restart keep them from seeing each other."""

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
    with_room: list[list[list[int]]] = [[] for _ in range(capacity + 1)]  # tokens left -> the sequences that have them
    sequences: list[list[int]] = []
    # Bit r is set where with_room[r] is not empty: the lowest bit from `length` on is the best fit, found without a
    # sorted list, whose insertions cost seconds at 100,000 documents.
    occupied = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        fitting = occupied >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            sequence = with_room[room].pop()
            if not with_room[room]:
                occupied ^= 1 << room
        else:
            room, sequence = capacity, []
            sequences.append(sequence)
        sequence.append(index)
        with_room[room - length].append(sequence)
        occupied |= 1 << (room - length)
    return sorted(sorted(sequence) for sequence in sequences)
