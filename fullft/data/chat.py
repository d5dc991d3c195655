"""Conversations: which stretches of a chat template's text are learned, the turns of the assistant.

Where a template has `{% generation %}` marks, these say it. Elsewhere a turn begins where the template's generation
prompt ends, and ends with its EOS, or with everything that the template writes for it. Some templates write a turn in
another way once others follow:

- A prompt or an end that only the last turn has (Phi-3, gpt-oss, DeepSeek-R1): the turn is located by its text.
- Reasoning that earlier turns lose (Qwen3): the conversation becomes one row per turn, which then is the last.
"""

import itertools
import re
from dataclasses import replace

from fullft.data.messages import Conversation, strings
from fullft.data.pieces import Piece
from fullft.data.rendered import Rendered, RowError, Span
from fullft.data.template import Chat, ChatTemplate, Rendering

_SHOWN = 60  # characters of a missing text


def render_chat(conversation: Conversation, template: ChatTemplate, sanitizes: bool = False) -> list[Rendered]:
    """Render by the chat template; the turns of the assistant are the targets.

    Args:
        conversation: from a row.
        template: the tokenizer's.
        sanitizes: whether the row's own text must be told apart from the template's.

    Returns:
        One row; or one for each turn that is learned, if the template writes earlier turns differently.

    Raises:
        DataError: the tokenizer has no chat template.
        RowError: the template refuses the conversation or leaves some of it out.
    """
    chat = template.open(conversation)
    count = len(chat.messages)
    whole = chat.rendering(count)
    _refuse_missing([piece for piece in whole.missing if not piece.is_reasoning], conversation)
    turns = [
        number
        for number, message in enumerate(conversation.messages)
        if message.role == "assistant" and not message.is_kept_out and number >= conversation.first_target
    ]
    learned = [number for number in turns if not _is_silent(chat, whole, number)]
    rows = _as_one_row(chat, whole, learned)
    is_split = rows is None and learned != [count - 1]
    if rows is None:
        rows = [_row_of_turn(chat, number) for number in learned]
    finished = [_finished(row, chat, rendering, sanitizes, learned, is_split) for row, rendering in rows]
    num_kept_out = sum(message.role == "assistant" and message.is_kept_out for message in conversation.messages)
    first = [replace(row, num_kept_out=num_kept_out, num_silent=len(turns) - len(learned)) for row in finished[:1]]
    return first + finished[1:]


def _is_silent(chat: Chat, whole: Rendering, number: int) -> bool:
    """Return whether the text holds nothing that a turn says, not even when the turn is the last."""
    if chat.conversation.messages[number].calls or whole.span_of(number) is not None:
        return False
    return chat.rendering(number + 1).span_of(number) is None


# ---------------------------------------------------------------------------------------------- one row, or several

_Row = tuple[Rendered, Rendering]


def _as_one_row(chat: Chat, whole: Rendering, learned: list[int]) -> list[_Row] | None:
    """Return a conversation as one row; None if earlier turns would lose something."""
    lost = {piece.message for piece in whole.missing}
    if lost.intersection(learned):
        return None
    if whole.marks:
        return [(_by_marks(whole, chat, learned), whole)]
    targets = [_locate(chat, whole, number) for number in learned]
    if None in targets:
        return None
    return [(Rendered(whole.text, [target for target in targets if target is not None]), whole)]


def _row_of_turn(chat: Chat, number: int) -> _Row:
    """Return the row that ends with a turn, and learns it alone."""
    rendering = chat.rendering(number + 1)
    # The reasoning of earlier turns is left out where the model will not see it either.
    kept = [piece for piece in rendering.missing if not (piece.is_reasoning and piece.message < number)]
    _refuse_missing(kept, chat.conversation)
    if rendering.marks:
        return _by_marks(rendering, chat, [number]), rendering
    target = _locate(chat, rendering, number)
    if target is None:
        raise RowError(
            f"the chat template writes the messages before message {number + 1} differently when it asks for that "
            "message: what is learned there cannot be told; use another chat_template.jinja"
        )
    return Rendered(rendering.text, [target]), rendering


def _refuse_missing(pieces: list[Piece], conversation: Conversation) -> None:
    if not pieces:
        return
    piece = pieces[0]
    text = piece.text if len(piece.text) <= _SHOWN else f"{piece.text[:_SHOWN]} ..."
    if piece.message < 0:
        raise RowError(f"the chat template leaves out the tool {text!r}: use a template that writes tools")
    role = conversation.messages[piece.message].fields["role"]
    raise RowError(
        f"the chat template leaves out {piece.what} of message {piece.message + 1}, of role {role!r} ({text!r}): use a "
        "template that writes it, or take it out of the rows"
    )


def _finished(
    row: Rendered, chat: Chat, rendering: Rendering, sanitizes: bool, learned: list[int], is_split: bool
) -> Rendered:
    """Say what tokenising must know besides the targets."""
    eos, stripped = chat.template.eos, rendering.text.rstrip()
    ends_turn = stripped.endswith(eos)
    learns_eos = rendering.count - 1 in learned
    kept_out = [_extent(chat, rendering, number) for number in range(rendering.count) if number not in learned]
    own: tuple[Span, ...] = ()
    if any(chat.template.special_tokens.search(text) for text in strings(chat.messages)):
        own = tuple(span for _, span in rendering.spans)
        if sanitizes and not own:
            raise RowError("special tokens in the row's own text cannot be told from the chat template's")
    if sanitizes and any(chat.template.special_tokens.search(text) for text in strings(chat.conversation.tools or [])):
        raise RowError("special tokens in the row's tools cannot be told from the chat template's")
    end = max((end for _, end in row.targets), default=0)
    return replace(
        row,
        has_special_tokens=True,
        ends_turn=ends_turn,
        learns_eos=learns_eos,
        kept_out=tuple(span for span in kept_out if span is not None),
        own=own,
        is_split=is_split,
        unread_fields=chat.unread_fields(),
        leaves_eos_out=row.are_marks and ends_turn and learns_eos and end <= len(stripped) - len(eos),
    )


# ---------------------------------------------------------------------------------------------- targets


def _by_marks(rendering: Rendering, chat: Chat, learned: list[int]) -> Rendered:
    """Take the template's marks, without those of turns that are not learned."""
    mine = [span for number in learned if (span := rendering.span_of(number)) is not None]
    targets = rendering.marks
    if len(learned) < sum(message["role"] == "assistant" for message in chat.messages):
        targets = [mark for mark in targets if any(_overlap(mark, span) for span in mine)]
    num_unmarked = sum(not any(_overlap(mark, span) for mark in targets) for span in mine)
    return Rendered(rendering.text, targets, are_marks=True, num_unmarked=num_unmarked)


def _overlap(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _locate(chat: Chat, rendering: Rendering, number: int) -> Span | None:
    """Find a turn in a text; None if the text before it, or its own, is another one than when it was the last.

    Args:
        chat: the conversation.
        rendering: of it, or of its beginning, through this turn at least.
        number: of the turn.
    """
    text, span = rendering.text, rendering.span_of(number)
    start = _start(chat, rendering, number)
    if start is None:
        return None
    through = chat.text(number + 1)
    if text.startswith(through):
        return start, _end_of_turn(text, start, len(through), chat.template.eos)
    alone = chat.rendering(number + 1)
    alone_span = alone.span_of(number)
    # Up to where the turn's own text ends, all must be the same; what closes it may differ.
    if span is None or alone_span is None or text[: span[1]] != alone.text[: alone_span[1]]:
        return None
    closing, last_closing = text[span[1] :], alone.text[alone_span[1] :]
    length = _common(closing, last_closing, chat.template.added_tokens)
    if chat.template.added_tokens.search(closing, 0, length) is None:  # another token closes it than the last turn
        token = chat.template.added_tokens.match(closing, length)
        length = token.end() if token is not None else length
    return start, _end_of_turn(text, start, span[1] + length, chat.template.eos)


def _start(chat: Chat, rendering: Rendering, number: int) -> int | None:
    """Return where a turn begins: behind what the generation prompt and the text have in common."""
    text, span = rendering.text, rendering.span_of(number)
    try:
        before = chat.text(number, prompt=True) if number else _before_first_turn(chat)
    except RowError:  # the template prompts behind a user's turn alone
        return span[0] if span is not None else None
    if text.startswith(before):
        return len(before)
    common = _common(text, before, chat.template.added_tokens)
    earlier = [end for piece, (_, end) in rendering.spans if 0 <= piece.message < number]
    if span is None or common < max((end for end in earlier if end <= span[0]), default=0):
        return None
    return min(common, span[0])


def _before_first_turn(chat: Chat) -> str:
    """Return what a template writes before a conversation's first turn, where that is the assistant's.

    Templates refuse to prompt for a turn after none: the prompt is taken from behind the turn, and looked for in it.
    """
    turn, added_tokens = chat.text(1), chat.template.added_tokens
    prompt = chat.text(1, prompt=True).removeprefix(turn)
    span = chat.rendering(1).span_of(0)
    begins = next((atom for atom in _atoms(prompt, added_tokens) if atom), None)
    place = -1 if begins is None else turn.rfind(begins, 0, span[0] if span is not None else len(turn))
    return turn[: place + _common(turn[place:], prompt, added_tokens)] if place >= 0 else ""


def _extent(chat: Chat, rendering: Rendering, number: int) -> Span | None:
    """Return the stretch of a turn that is not learned even with `train_on_prompt`; None if it is like any prompt."""
    message, span = chat.conversation.messages[number], rendering.span_of(number)
    if message.role == "assistant" and (message.is_kept_out or span is None):
        return _locate(chat, rendering, number) or span
    return span if message.is_kept_out else None


def _end_of_turn(text: str, start: int, end: int, eos: str) -> int:
    """Leave out the white space that templates put after EOS: generation has stopped by then."""
    stripped = len(text[start:end].rstrip()) + start
    return stripped if text[start:stripped].endswith(eos) else end


def _common(one: str, other: str, added_tokens: re.Pattern[str]) -> int:
    """Return how many characters two texts have in common at their beginnings; an added token is one or none of it."""
    length = 0
    for mine, theirs in zip(_atoms(one, added_tokens), _atoms(other, added_tokens), strict=False):
        if mine != theirs:
            both = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(mine, theirs, strict=False))
            is_token = added_tokens.fullmatch(mine) or added_tokens.fullmatch(theirs)
            return length if is_token else length + sum(1 for _ in both)
        length += len(mine)
    return length


def _atoms(text: str, added_tokens: re.Pattern[str]) -> list[str]:
    """Split a text into added tokens and what is between."""
    atoms, end = [], 0
    for token in added_tokens.finditer(text):
        atoms += [text[end : token.start()], token[0]]
        end = token.end()
    return [*atoms, text[end:]]
