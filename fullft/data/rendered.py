"""A row as text, and the stretches of it that the model learns to write."""

from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Span = tuple[int, int]  # [start, end) characters of a text


class RowError(ValueError):
    """A row does not hold what its format needs. The caller knows which row it was."""


@dataclass(frozen=True)
class Rendered:
    """A row as text, or one of the rows that it becomes.

    Attributes:
        text: prompt and response in one string, so that they are tokenised together.
        targets: the stretches that the model learns to write.
        has_special_tokens: whether the text already holds BOS and the like, as chat templates write them.
        ends_turn: whether EOS already follows the last response in the text.
        learns_eos: whether the EOS that is added is learned; behind a user's turn it is not.
        are_marks: whether the targets are a template's own marks: then a token that reaches into one is learned, as
            transformers has it. Elsewhere a token is learned that begins in a target.
        kept_out: stretches that are not learned even with `train_on_prompt`.
        own: the stretches that the row's own text fills. Special tokens in there are not the template's.
        is_split: whether this is one of several rows that a conversation became.
        num_kept_out: turns that the row keeps out of the loss.
        num_silent: turns of the assistant that say nothing, which are not learned.
        num_unmarked: turns that the template's marks leave out, which are not learned.
        unread_fields: fields of messages that the template does not read.
        leaves_eos_out: whether the template's marks leave out the EOS behind the last turn.
    """

    text: str
    targets: list[Span]
    has_special_tokens: bool = False
    ends_turn: bool = False
    learns_eos: bool = True
    are_marks: bool = False
    kept_out: tuple[Span, ...] = ()
    own: tuple[Span, ...] = ()
    is_split: bool = False
    num_kept_out: int = 0
    num_silent: int = 0
    num_unmarked: int = 0
    unread_fields: tuple[str, ...] = ()
    leaves_eos_out: bool = False
