"""Packing: no document is split, lost or doubled, and few sequences are needed."""

import numpy as np
import pytest

from fullft.data.packing import pack


def random_lengths(count: int, capacity: int, seed: int = 0) -> list[int]:
    draws = np.random.default_rng(seed).lognormal(mean=np.log(capacity / 5), sigma=0.8, size=count)
    return np.clip(draws, 2, capacity).astype(int).tolist()


def best_fit_by_search(lengths: list[int], capacity: int) -> int:
    """Count the sequences of best-fit decreasing, by looking through all of them each time."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        room = min(fitting, default=capacity)
        if fitting:
            rooms.remove(room)
        rooms.append(room - length)
    return len(rooms)


@pytest.mark.parametrize("capacity", [16, 512, 4096])
def test_every_document_is_packed_once_within_capacity(capacity: int) -> None:
    lengths = random_lengths(2000, capacity)
    packed = pack(lengths, capacity)
    assert sorted(index for sequence in packed for index in sequence) == list(range(2000))
    assert max(sum(lengths[index] for index in sequence) for sequence in packed) <= capacity


def test_documents_of_full_capacity_are_packed_alone() -> None:
    assert pack([8, 8, 3, 8], 8) == [[0], [1], [2], [3]]


def test_one_document_less_room_needs_one_sequence_more() -> None:
    assert pack([4, 4], 8) == [[0, 1]]
    assert pack([4, 5], 8) == [[0], [1]]


def test_the_best_fit_is_chosen_not_the_first() -> None:
    # 7 and 6 leave 3 and 4; the 3 must fill the 3, so that both 2s find room.
    assert pack([6, 7, 3, 2, 2], 10) == [[0, 3, 4], [1, 2]]


def test_packing_is_deterministic_and_ordered_by_first_document() -> None:
    lengths = random_lengths(1000, 64, seed=1)
    packed = pack(lengths, 64)
    assert packed == pack(list(lengths), 64)
    assert [sequence[0] for sequence in packed] == sorted(sequence[0] for sequence in packed)
    assert all(sequence == sorted(sequence) for sequence in packed)


@pytest.mark.parametrize("seed", range(5))
def test_packing_uses_the_sequences_of_best_fit_decreasing(seed: int) -> None:
    lengths = random_lengths(600, 128, seed)
    packed = pack(lengths, 128)
    assert len(packed) == best_fit_by_search(lengths, 128)
    assert len(packed) <= 11 / 9 * np.ceil(sum(lengths) / 128) + 1
    assert len(packed) < 600  # unpacked


def test_nothing_packs_to_nothing() -> None:
    assert pack([], 8) == []


def test_100_000_documents_are_packed_densely() -> None:
    lengths = random_lengths(100_000, 4096)
    assert len(pack(lengths, 4096)) <= 1.01 * sum(lengths) / 4096 + 1
