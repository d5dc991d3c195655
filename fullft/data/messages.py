"""Messages: turns of conversations, whatever their data set calls things, as chat templates take them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fullft.data.rendered import RowError

_RESULTS = ("response", "responses", "result", "results", "output", "outputs")
# The names that data sets have for roles, in whatever case. Others are handed to the template as they are.
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatbot", "chatgpt", "ai", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function"), "tool"),
    **dict.fromkeys((f"{what}_{name}" for what in ("tool", "function") for name in _RESULTS), "tool"),
    **dict.fromkeys(("function_call", "function_calls", "tool_call", "tool_calls"), "call"),
}
# Flags of a message that say whether it is learned.
_FLAGS = ("weight", "train", "training", "loss")
REASONING = ("reasoning_content", "reasoning", "thinking")
_MEDIA = ("image", "image_url", "audio", "input_audio", "video", "file", "document")


@dataclass(frozen=True)
class Message:
    """A message of a conversation.

    Attributes:
        fields: as the template gets it: `role`, `content` (text, or a list of parts; None beside calls), `tool_calls`
            and whatever else the row has.
        is_kept_out: whether the row says that it is not to be learned.
    """

    fields: dict[str, Any]
    is_kept_out: bool = False

    @property
    def role(self) -> str:
        """Who speaks."""
        return str(self.fields["role"])

    @property
    def calls(self) -> list[dict[str, Any]]:
        """Its calls of tools, each with `function.name` and `function.arguments`."""
        return self.fields.get("tool_calls") or []


@dataclass(frozen=True)
class Conversation:
    """What a template gets of a row.

    Attributes:
        messages: at least one.
        tools: descriptions of tools, as JSON schemas; None without any.
        variables: whatever else the row has that the template reads.
        first_target: the first message that may be learned.
    """

    messages: tuple[Message, ...]
    tools: list[Any] | None = None
    variables: dict[str, Any] | None = None
    first_target: int = 0


def to_messages(turns: Any) -> list[Message]:
    """Bring turns to `role` and `content`, and check each.

    Args:
        turns: a list of mappings with `role` and `content`, or with `from` and `value` as in ShareGPT; or that as JSON.

    Raises:
        RowError: there are no turns, or one lacks its role or its text, or holds something that cannot be trained on.
    """
    turns = decoded(turns, "messages")
    if not turns:
        raise RowError("there are no messages")
    if not isinstance(turns, list):
        raise RowError(f"messages is {type(turns).__name__}, expected a list of objects with 'role' and 'content'")
    from_value = isinstance(turns[0], dict) and "from" in turns[0] and "role" not in turns[0]
    keys = ("from", "value") if from_value else ("role", "content")
    return [_message(turn, number, *keys) for number, turn in enumerate(turns, start=1)]


def decoded(value: Any, name: str) -> Any:
    """Decode a column that holds JSON as text, as Parquet files often do.

    Args:
        value: text is decoded; anything else is returned.
        name: of the column, for the message.

    Raises:
        RowError: the text is not JSON.
    """
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise RowError(f"{name} is text that is no JSON ({error.msg}, column {error.colno})") from error


def _message(turn: Any, number: int, role_key: str, content_key: str) -> Message:
    if isinstance(turn, str) and turn.lstrip().startswith("{"):
        turn = decoded(turn, f"message {number}")
    fields = {name: value for name, value in turn.items() if value is not None} if isinstance(turn, dict) else {}
    role, content = fields.pop(role_key, None), fields.pop(content_key, None)
    if not isinstance(role, str):
        raise RowError(f"message {number} needs {role_key!r} and {content_key!r} as text")
    is_kept_out = _is_kept_out(fields, number)
    known = _ROLES.get(role.strip().lower().replace("-", "_"), role)
    if known in ("assistant", "call") or is_kept_out:  # elsewhere nothing honours that a turn is to be learned
        fields = {name: value for name, value in fields.items() if name not in _FLAGS}
    calls = fields.pop("tool_calls", None)
    if known == "call":
        known, calls, content = "assistant", _calls_of_text(content, number, role), None
    elif known == "assistant" and "function_call" in fields:  # what OpenAI had before tool_calls
        if calls:
            raise RowError(f"message {number} has both function_call and tool_calls: keep one")
        calls = [fields.pop("function_call")]
    if calls:
        fields["tool_calls"] = _calls(calls, number)
    if isinstance(content, list):
        content = _parts(content, number)
    fields = _with_names_of_reasoning(fields)
    has_more = bool(calls) or "thinking" in fields  # a call has no text
    if not isinstance(content, str | list) and (content is not None or not has_more):
        raise RowError(f"message {number} needs {role_key!r} and {content_key!r} as text")
    return Message({**fields, "role": known, "content": content}, is_kept_out)


def _with_names_of_reasoning(fields: dict[str, Any]) -> dict[str, Any]:
    """Give reasoning under both names that templates read; transformers before 5.23 does not see to that."""
    reasoning = next((fields[name] for name in REASONING if name in fields), None)
    return fields if reasoning is None else {"thinking": reasoning, **fields, "reasoning_content": reasoning}


def _is_kept_out(fields: dict[str, Any], number: int) -> bool:
    kept_out = []
    for name in _FLAGS:
        if name not in fields:
            continue
        value = fields[name]
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RowError(f"message {number} has {name} {value!r}: only 0 and 1, or false and true, can be honoured")
        kept_out.append(not value)
    if len(set(kept_out)) > 1:
        raise RowError(f"message {number} says both that it is learned and that it is not")
    return any(kept_out)


def _calls_of_text(value: Any, number: int, role: str) -> list[Any]:
    """Read a turn of its own that is a call, as ShareGPT has them: JSON with `name` and `arguments`."""
    calls = decoded(value, f"message {number}, of role {role},")
    return calls if isinstance(calls, list) else [calls]


def _calls(calls: Any, number: int) -> list[dict[str, Any]]:
    calls = decoded(calls, f"message {number}: tool_calls")
    if not isinstance(calls, list):
        raise RowError(f"message {number}: tool_calls is no list")
    return [_call(decoded(call, f"message {number}: a call"), number) for call in calls]


def _call(call: Any, number: int) -> dict[str, Any]:
    """Bring a call to `function.name` and `function.arguments`, the latter an object or its JSON, as the row has it."""
    is_flat = isinstance(call, dict) and "function" not in call
    inner = call if is_flat else call.get("function") if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise RowError(f"message {number}: a call needs the name of its function")
    if is_flat:
        arguments = call.get("arguments", call.get("parameters"))
        inner = {"name": call["name"], "arguments": arguments}
        outer = {name: value for name, value in call.items() if name not in ("name", "arguments", "parameters")}
        call = {"type": "function", **outer, "function": inner}
    function = {name: value for name, value in inner.items() if value is not None or name == "arguments"}
    if "arguments" in function:
        function["arguments"] = _arguments(function["arguments"], function["name"], number)
    return {name: value for name, value in (call | {"function": function}).items() if value is not None}


def _arguments(arguments: Any, function: str, number: int) -> Any:
    if arguments is None or arguments == "":
        return {}
    if not isinstance(arguments, str):
        return arguments
    try:
        json.loads(arguments)
    except json.JSONDecodeError as error:
        raise RowError(
            f"message {number}: the arguments of the call of {function} are no JSON ({error.msg})"
        ) from error
    return arguments


def _parts(parts: list[Any], number: int) -> list[dict[str, Any]]:
    """Check a content that is a list of parts; each is text, or something with text in it."""
    checked = []
    for part in parts:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, dict):
            raise RowError(f"message {number} has a part that is neither text nor an object")
        part = {name: value for name, value in part.items() if value is not None}
        kind = part.get("type", "text")
        if kind in _MEDIA or any(name in part for name in _MEDIA):
            raise RowError(f"message {number} has a part of type {kind}: only text can be trained on")
        checked.append(part)
    return checked


def joined(parts: list[dict[str, Any]]) -> str | None:
    """Return parts as one text, for templates that take no parts; None if one of them is not text alone."""
    if any(part.get("type", "text") != "text" or not isinstance(part.get("text"), str) for part in parts):
        return None
    return "".join(part["text"] for part in parts)


def strings(value: Any) -> Iterator[str]:
    """Yield all texts in nested lists and objects, their keys apart."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from strings(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from strings(entry)
