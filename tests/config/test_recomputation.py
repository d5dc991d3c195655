"""Recomputation: the words of `--activation_checkpointing`."""

import pytest

from fullft.config.recomputation import Recomputation


@pytest.mark.parametrize(
    ("word", "every", "selective", "share"),
    [
        ("none", 0, False, 0),
        ("auto", 0, False, 0),
        ("selective", 0, True, 0),
        ("full", 1, False, 1),
        ("every_1", 1, False, 1),
        ("every_4", 4, False, 0.25),
    ],
)
def test_a_word_is_read_as_what_is_recomputed(word: str, every: int, selective: bool, share: float) -> None:
    recomputation = Recomputation.parse(word)
    assert recomputation == Recomputation(every, selective)
    assert recomputation.share == share
    assert recomputation.is_any == (every > 0 or selective)
