"""A row as text, and the stretches of it that the model learns to write."""

from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


class RowError(ValueError):
    """A row does not hold what its format needs. The caller knows which row it was."""


@dataclass(frozen=True)
class Rendered:
    """A row as text.

    Attributes:
        text: prompt and response in one string, so that they are tokenised together.
        targets: [start, end) character ranges of `text` that the model learns to write.
        has_special_tokens: whether the text already holds BOS and the like, as chat templates write them.
        ends_turn: whether EOS already follows the last response in the text.
    """

    text: str
    targets: list[tuple[int, int]]
    has_special_tokens: bool = False
    ends_turn: bool = False
