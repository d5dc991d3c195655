"""The tokenizer's chat template: the text that it writes of a conversation, and where in it each message went."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import jinja2.meta
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from fullft.data.messages import REASONING, Conversation, joined, strings
from fullft.data.pieces import Marker, Piece, around, find_marks, holds, search
from fullft.data.rendered import RowError, Span
from fullft.errors import DataError

_WRITTEN = {"role", "content", "tool_calls", *REASONING}
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendering:
    """What a template makes of a conversation.

    Attributes:
        count: of messages that it was made of.
        text: all of it.
        marks: the stretches between the template's `{% generation %}` marks.
        spans: of each piece that was found, in the order of the text.
        missing: the pieces that the template left out.
    """

    count: int
    text: str
    marks: list[Span]
    spans: list[tuple[Piece, Span]]
    missing: list[Piece]

    def span_of(self, message: int) -> Span | None:
        """Return where a message's text begins and ends; None if none of it was located."""
        spans = [span for piece, span in self.spans if piece.message == message]
        return (min(start for start, _ in spans), max(end for _, end in spans)) if spans else None


class Chat:
    """A conversation in the form in which the template takes it.

    Args:
        template: that renders it.
        conversation: it.
        messages: its messages' fields, as this template reads them.
    """

    def __init__(self, template: "ChatTemplate", conversation: Conversation, messages: list[dict[str, Any]]) -> None:
        self.template, self.conversation, self.messages = template, conversation, messages
        self._renderings: dict[int, Rendering] = {}

    def text(self, count: int, prompt: bool = False) -> str:
        """Render some of the messages.

        Args:
            count: the first ones.
            prompt: add what asks the assistant for a turn.

        Raises:
            RowError: the template refuses them.
        """
        if not prompt and count in self._renderings:
            return self._renderings[count].text
        return self.template.write(self.messages[:count], self.conversation, prompt)[0]

    def rendering(self, count: int) -> Rendering:
        """Render some of the messages, and find their pieces in the text.

        Args:
            count: the first ones.

        Raises:
            RowError: the template refuses them.
        """
        if count not in self._renderings:
            self._renderings[count] = self._locate(count)
        return self._renderings[count]

    @property
    def writes_python(self) -> bool:
        """Whether parts or arguments stand in the text as Python writes objects: the template takes them as text."""
        objects: list[Any] = []
        for message in self.messages:
            objects += message["content"] if isinstance(message.get("content"), list) else []
            objects += [call["function"].get("arguments") for call in message.get("tool_calls") or []]
        written = {str(value) for value in objects if value and isinstance(value, dict)}
        if not written:
            return False
        text, own = self.text(len(self.messages)), list(strings(self.messages))
        return any(text.count(each) > sum(said.count(each) for said in own) for each in written)

    def unread_fields(self) -> tuple[str, ...]:
        """Return the messages' fields, besides what must be found in the text, that the template does not name."""
        source = self.template.source(bool(self.conversation.tools))
        names = dict.fromkeys(name for message in self.messages for name in message if name not in _WRITTEN)
        return tuple(name for name in names if not _is_named(source, name))

    def _locate(self, count: int) -> Rendering:
        messages, conversation = self.messages[:count], self.conversation
        text, marks = self.template.write(messages, conversation, prompt=False)
        marker = Marker()
        marked_messages = [marker.message(message, number) for number, message in enumerate(messages)]
        tools = [name for tool in conversation.tools or [] if (name := _name_of(tool))]
        # The names of tools alone are looked for: templates may write their descriptions in a language of their own.
        expected = [Piece(-1, "tool", name) for name in tools if name not in text]
        found: dict[int, Span] | None = None
        if marker.can_be_found:
            try:
                found = find_marks(self.template.write(marked_messages, conversation, prompt=False)[0], text)
            except RowError:
                found = None
        if found is None:  # the marks changed what the template wrote
            missing = [piece for piece in marker.pieces if not holds(text, piece.text)]
            missing += [piece for piece in marker.unmarked if not holds(text, piece.text)]
            spans = search(text, marker.pieces)
        else:
            spans = sorted(((marker.pieces[n], span) for n, span in found.items()), key=lambda each: each[1])
            # What stands between the marks may have been changed, and what has none stands by its message.
            found = {n: span for n, span in found.items() if holds(text[slice(*span)], marker.pieces[n].text)}
            missing = [piece for number, piece in enumerate(marker.pieces) if number not in found]
            places = {piece.message: slice(*around(piece.message, spans, len(text))) for piece in marker.unmarked}
            missing += [piece for piece in marker.unmarked if not holds(text[places[piece.message]], piece.text)]
        spans = [(piece, piece.widened(text, span)) for piece, span in spans]
        missing += expected
        return Rendering(count, text, marks, spans, missing)


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: has the template, or has none: then the first conversation is refused.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._roles_with_parts: dict[str, bool] = {}

    @cached_property
    def eos(self) -> str:
        """The token that ends a text."""
        return str(self.tokenizer.eos_token)

    @cached_property
    def added_tokens(self) -> re.Pattern[str]:
        """Matches the tokens that are one whatever stands around them, such as `<|im_end|>`."""
        names = sorted((str(token) for token in self.tokenizer.get_added_vocab()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or "(?!)")

    @cached_property
    def special_tokens(self) -> re.Pattern[str]:
        """Matches the added tokens that control a model, rather than being words."""
        tokens = self.tokenizer.added_tokens_decoder.values()
        names = sorted((token.content for token in tokens if token.special), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or "(?!)")

    def source(self, has_tools: bool) -> str:
        """Return the template's text; some tokenizers have another one for tools.

        Raises:
            DataError: the tokenizer has no chat template.
        """
        if self.tokenizer.chat_template is None:
            raise DataError(
                "the rows are conversations and the tokenizer has no chat template: train an instruct model, or put "
                "the template that you want into chat_template.jinja in the model's folder"
            )
        return str(self.tokenizer.get_chat_template(None, [{}] if has_tools else None))

    def reads(self, has_tools: bool) -> frozenset[str]:
        """Return the names of the variables that the template reads."""
        return _variables(self.source(has_tools))

    def has_marks(self, has_tools: bool) -> bool:
        """Return whether the template marks what the assistant writes."""
        return _GENERATION.search(self.source(has_tools)) is not None

    def write(
        self, messages: Sequence[dict[str, Any]], conversation: Conversation, prompt: bool
    ) -> tuple[str, list[Span]]:
        """Let the template write messages.

        Args:
            messages: as it takes them.
            conversation: whose tools and variables it gets.
            prompt: add what asks the assistant for a turn.

        Returns:
            The text, and the stretches that the template marks.

        Raises:
            RowError: the template refuses the messages.
        """
        source = self.source(bool(conversation.tools))
        marks = self.has_marks(bool(conversation.tools))
        variables = dict(conversation.variables or {})
        try:
            texts, spans = render_jinja_template(
                conversations=[list(messages)],
                tools=conversation.tools,
                documents=variables.pop("documents", None),
                chat_template=source,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=prompt,
                **{**self.tokenizer.special_tokens_map, **variables},
            )
        except Exception as error:  # templates raise what they like, most often jinja2's TemplateError
            raise RowError(f"the chat template refuses it: {error}") from error
        return str(texts[0]), [tuple(span) for span in spans[0]] if marks else []

    def open(self, conversation: Conversation) -> Chat:
        """Bring a conversation to the form in which the template writes all of it.

        Templates differ in what they take beside a call for no content (null, empty text, no such key), in whether
        arguments are an object or its JSON, and in whether a content is text or parts.

        Raises:
            RowError: the template refuses every form.
        """
        chats: list[Chat] = []
        refusals: list[RowError] = []
        for messages in self._forms(conversation):
            chat = Chat(self, conversation, messages)
            try:
                missing = chat.rendering(len(messages)).missing
            except RowError as error:
                refusals.append(error)
                continue
            if all(piece.is_reasoning for piece in missing) and not chat.writes_python:
                return chat
            chats.append(chat)
        if not chats:
            raise refusals[0]
        return chats[0]

    def _forms(self, conversation: Conversation) -> Iterator[list[dict[str, Any]]]:
        fields = [self._with_content(message.fields, i + 1) for i, message in enumerate(conversation.messages)]
        needs_content = any(message["content"] is None for message in fields)
        has_calls = any(message.get("tool_calls") for message in fields)
        for as_text in (False, True) if has_calls else (False,):
            written = [_with_arguments(message, as_text) for message in fields]
            for content in ("", _NO_KEY, None) if needs_content else ("",):
                yield [_with_empty_content(message, content) for message in written]
        if all(isinstance(message["content"], str) for message in fields):  # templates of models that see images
            yield [message | {"content": [{"type": "text", "text": message["content"]}]} for message in fields]

    def _with_content(self, fields: dict[str, Any], number: int) -> dict[str, Any]:
        """Join a content's parts, unless the template takes parts."""
        content = fields["content"]
        if not isinstance(content, list) or self._takes_parts(fields["role"]):
            return fields
        text = joined(content)
        if text is None:
            kinds = ", ".join(sorted({str(part.get("type", "text")) for part in content}))
            raise RowError(f"message {number} has parts of the types {kinds}, and the chat template takes text alone")
        return fields | {"content": text}

    def _takes_parts(self, role: str) -> bool:
        if role not in self._roles_with_parts:
            before = [] if role in ("user", "system") else [{"role": "user", "content": "Hi"}]
            after = [{"role": "user", "content": "Hi"}] if role == "system" else []
            texts: list[str | None] = []
            for content in ("Well", [{"type": "text", "text": "Well"}]):
                try:
                    messages: list[dict[str, Any]] = [*before, {"role": role, "content": content}, *after]
                    texts.append(self.write(messages, Conversation(()), prompt=False)[0])
                except RowError:
                    texts.append(None)
            self._roles_with_parts[role] = texts[1] is not None and texts[0] == texts[1]
        return self._roles_with_parts[role]


_NO_KEY = object()


def _with_empty_content(message: dict[str, Any], content: Any) -> dict[str, Any]:
    if message["content"] is not None:
        return message
    if content is _NO_KEY:
        return {name: value for name, value in message.items() if name != "content"}
    return message | {"content": content}


def _with_arguments(message: dict[str, Any], as_text: bool) -> dict[str, Any]:
    """Write the arguments of calls as JSON text, or as what that says."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        if "arguments" not in call["function"]:
            calls.append(call)
            continue
        arguments = call["function"]["arguments"]
        if as_text and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        elif not as_text and isinstance(arguments, str):
            arguments = json.loads(arguments)
        calls.append(call | {"function": call["function"] | {"arguments": arguments}})
    return message | {"tool_calls": calls}


@cache
def _is_named(source: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", source) is not None


@cache
def _variables(source: str) -> frozenset[str]:
    environment = _compile_jinja_template(source).environment  # transformers': it knows tags of its own
    return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)) - set(environment.globals))


def _name_of(tool: Any) -> str | None:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None
