"""The pieces of a conversation's text, and where a chat template puts them.

To find that out, a conversation is rendered once more with a mark around each piece. What has no mark in the result was
left out by the template. Marks are characters for private use, which no tokenizer gives a meaning.
"""

import json
import re
from dataclasses import dataclass, replace
from typing import Any

from fullft.data.messages import REASONING
from fullft.data.rendered import Span

_FIRST_MARK, _LAST_MARK = 0xF0000, 0x10FFFD
_MOST_PIECES = (_LAST_MARK - _FIRST_MARK) // 2
_MARKS = re.compile(f"[{chr(_FIRST_MARK)}-{chr(_LAST_MARK)}]")
# What templates look for in a content, and split it at; marks stay inside of what is between.
_TAG = re.compile(r"(</?[A-Za-z_][\w-]*>|\[/?[A-Z_]+\]|<\|[A-Z_]*(?:THINK|RESPONSE|ACTION)[A-Z_]*\|>)")
# Tags that only tell templates where something begins or ends. Others are text like any other.
_PARTING_TAG = re.compile(
    r"</?(?:think|thinking|thought|reasoning)>|\[/?THINK\]|<\|[A-Z_]*(?:THINK|RESPONSE|ACTION)[A-Z_]*\|>", re.IGNORECASE
)
_END_OF_REASONING = re.compile(r"</(?:think|thinking|thought|reasoning)>|\[/THINK\]|<\|END_THINKING\|>", re.IGNORECASE)


@dataclass(frozen=True)
class Piece:
    """A piece of a conversation's text, which must be found in the rendered text.

    Attributes:
        message: its number; -1 for a tool's name.
        what: for messages to the user.
        text: without white space around it.
        is_reasoning: whether it is an assistant's reasoning, which templates leave out of earlier turns.
        before: the tags that stand before it, behind the last piece of the same text.
        after: the tags behind a text's last piece.
    """

    message: int
    what: str
    text: str
    is_reasoning: bool = False
    before: str = ""
    after: str = ""

    def widened(self, text: str, span: Span) -> Span:
        """Return where it stands with its tags, where these are in the text too."""
        start, end = span
        before = next((form for form in _forms(self.before) if text.endswith(form, 0, start)), "")
        after = next((form for form in _forms(self.after) if text.startswith(form, end)), "")
        return start - len(before), end + len(after)


class Marker:
    """Marks the pieces of messages, and collects them."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.unmarked: list[Piece] = []  # what is no text, such as numbers and names of arguments

    @property
    def can_be_found(self) -> bool:
        """Whether there are marks for all pieces, and no piece holds one by itself."""
        return len(self.pieces) <= _MOST_PIECES and not any(_MARKS.search(piece.text) for piece in self.pieces)

    def message(self, fields: dict[str, Any], number: int) -> dict[str, Any]:
        """Return a message whose content, reasoning and calls are marked."""
        marked = dict(fields)
        content = fields.get("content")
        is_assistant = fields["role"] == "assistant"
        if isinstance(content, str):
            marked["content"] = self._content(content, number, is_assistant)
        elif isinstance(content, list):
            marked["content"] = [self._part(part, number, is_assistant) for part in content]
        reasoning = next((name for name in REASONING if isinstance(fields.get(name), str)), None)
        if reasoning is not None:
            text = self._text(fields[reasoning], Piece(number, "the reasoning", "", is_reasoning=True))
            marked |= {name: text for name in REASONING if fields.get(name) == fields[reasoning]}
        if fields.get("tool_calls"):
            marked["tool_calls"] = [self._call(call, number) for call in fields["tool_calls"]]
        return marked

    def _content(self, content: str, number: int, is_assistant: bool) -> str:
        end = 0
        if is_assistant:
            end = max((match.start() for match in _END_OF_REASONING.finditer(content)), default=0)
        reasoning = self._text(content[:end], Piece(number, "the reasoning", "", is_reasoning=True))
        return reasoning + self._text(content[end:], Piece(number, "the content", ""))

    def _part(self, part: dict[str, Any], number: int, is_assistant: bool) -> dict[str, Any]:
        is_reasoning = is_assistant and part.get("type", "text") in ("thinking", "reasoning")
        piece = Piece(number, "the reasoning" if is_reasoning else "the content", "", is_reasoning)
        return {name: value if name == "type" else self._nested(value, piece) for name, value in part.items()}

    def _call(self, call: dict[str, Any], number: int) -> dict[str, Any]:
        function = call["function"]
        piece = Piece(number, f"the call of {function['name']}", "")
        marked = {"name": self._text(function["name"], piece)}
        if "arguments" in function:
            marked["arguments"] = self._nested(function["arguments"], piece)
        return call | {"function": function | marked}

    def _nested(self, value: Any, piece: Piece) -> Any:
        if isinstance(value, str):
            return self._text(value, piece)
        if isinstance(value, dict):
            self.unmarked += [Piece(piece.message, piece.what, name, piece.is_reasoning) for name in value]
            return {name: self._nested(entry, piece) for name, entry in value.items()}
        if isinstance(value, list):
            return [self._nested(entry, piece) for entry in value]
        self.unmarked.append(Piece(piece.message, piece.what, json.dumps(value), piece.is_reasoning))
        return value

    def _text(self, text: str, piece: Piece) -> str:
        """Mark a text between its tags, inside of white space, which templates may strip."""
        parts = _TAG.split(text)
        if not any(part.strip() for part in parts[::2]):  # all of it is tags: they are what it says
            cores = [place for place in range(1, len(parts), 2) if not _PARTING_TAG.fullmatch(parts[place])]
        else:
            cores = [place for place in range(0, len(parts), 2) if parts[place].strip()]
            tags = [tag for tag in parts[1::2] if not _PARTING_TAG.fullmatch(tag)]
            self.unmarked += [replace(piece, text=tag) for tag in tags]
        marked, between = "", ""
        for place, part in enumerate(parts):
            if place not in cores:
                marked, between = marked + part, between + part
                continue
            core = part.strip()
            start = part.index(core)
            end = start + len(core)
            between += part[:start]
            after = "".join(parts[place + 1 :]).rstrip() if place == cores[-1] else ""
            mark = _FIRST_MARK + 2 * len(self.pieces)
            before = between if place != cores[0] else between.lstrip()
            self.pieces.append(replace(piece, text=core, before=before, after=part[end:] + after if after else ""))
            marks = (chr(mark), chr(mark + 1)) if len(self.pieces) <= _MOST_PIECES else ("", "")
            marked += part[:start] + marks[0] + core + marks[1] + part[end:]
            between = part[end:]
        return marked


def find_marks(marked: str, text: str) -> dict[int, Span] | None:
    """Return where pieces stand in a text, by their numbers; None if without its marks it would be another one."""
    if _MARKS.sub("", marked) != text:
        return None
    places: dict[int, int] = {}
    for count, mark in enumerate(_MARKS.finditer(marked)):
        number = ord(mark[0]) - _FIRST_MARK
        # A template may write a text twice: all that lies between its ends counts.
        places[number] = mark.start() - count if number % 2 else places.get(number, mark.start() - count)
    return {
        number // 2: (start, places[number + 1])
        for number, start in places.items()
        if number % 2 == 0 and places.get(number + 1, -1) > start
    }


def holds(text: str, piece: str) -> bool:
    """Return whether a text holds a piece, as it is, as JSON or as Python writes it."""
    return any(form in text for form in _forms(piece))


def _forms(piece: str) -> tuple[str, ...]:
    words = {"null": ("null", "None"), "true": ("true", "True"), "false": ("false", "False")}
    as_json = (json.dumps(piece)[1:-1], json.dumps(piece, ensure_ascii=False)[1:-1])
    return words.get(piece, (piece, *as_json, repr(piece)[1:-1]))


def around(message: int, spans: list[tuple[Piece, Span]], length: int) -> Span:
    """Return the stretch that can be a message's: from the last piece of another one to the next.

    Args:
        message: its number.
        spans: of all pieces that were found.
        length: of the text.
    """
    mine = [span for piece, span in spans if piece.message == message]
    if not mine:
        return 0, length
    start, end = min(start for start, _ in mine), max(end for _, end in mine)
    others = [span for piece, span in spans if piece.message != message]
    begin = max((other for _, other in others if other <= start), default=0)
    return begin, min((other for other, _ in others if other >= end), default=length)


def search(text: str, pieces: list[Piece]) -> list[tuple[Piece, Span]]:
    """Find pieces by their text, each behind the last one."""
    spans, position = [], 0
    for piece in pieces:
        start = text.find(piece.text, position)
        if start >= 0:
            position = start + len(piece.text)
            spans.append((piece, (start, position)))
    return spans
