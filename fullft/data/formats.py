"""Row formats: how a row becomes text, and which stretches of it the model learns to write.

A format is recognised by its columns. `FORMATS` is the one place to add another.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from fullft.data.chat import render_chat
from fullft.data.messages import Conversation, Message, decoded, to_messages
from fullft.data.rendered import Rendered, Row, RowError, Span
from fullft.data.template import ChatTemplate
from fullft.errors import DataError


@dataclass(frozen=True)
class Reader:
    """What rows are rendered with.

    Attributes:
        template: the tokenizer's.
        sanitizes: whether special tokens in a row's own text become plain text.
    """

    template: ChatTemplate
    sanitizes: bool = False


@dataclass(frozen=True)
class RowFormat:
    """One format.

    Attributes:
        name: for messages.
        columns: give it away; all of them are there.
        render: makes one or several texts of a row.
        optional: columns that it reads too.
        is_chat: whether a chat template may write the text, and read more columns.
    """

    name: str
    columns: tuple[str, ...]
    render: Callable[[Row, Reader], list[Rendered]]
    optional: tuple[str, ...] = ()
    is_chat: bool = False

    def unread(self, columns: Iterable[str], template: ChatTemplate) -> list[str]:
        """Return the columns of the data that nothing reads.

        Args:
            columns: all of them.
            template: the tokenizer's.
        """
        read = {*self.columns, *self.optional}
        if self.is_chat and template.tokenizer.chat_template is not None:
            read |= {*_FOR_CHAT, *template.reads(has_tools=False), *template.reads(has_tools=True)}
        return [name for name in columns if name not in read]


# ---------------------------------------------------------------------------------------------- text


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise RowError(f"{column} is {'missing' if value is None else type(value).__name__}, expected text")
    return value


# Columns that say something of what a row teaches. A format that does not read one refuses rows that have it.
_WITH_MEANING = ("system", "system_prompt", "history", "tools", "functions", "documents", "chat_template_kwargs")


def _refuse_unread(row: Row, read: Iterable[str] = ()) -> None:
    for name in _WITH_MEANING:
        if row.get(name) not in (None, "", [], {}, "[]", "{}") and name not in read:
            raise RowError(
                f"nothing reads the column {name}, and it is not empty: save such rows as `messages`, or take it out"
            )


def _exchange(prompt: str, response: str, reader: Reader) -> list[Rendered]:
    text = _ended(prompt + response, reader)
    targets: list[Span] = [(len(prompt), len(text))] if response else []
    return [Rendered(text, targets, own=_own(text, reader))]


def _ended(text: str, reader: Reader) -> str:
    """Drop white space behind an EOS that ends a text, so that this EOS is the row's."""
    ends = not reader.sanitizes and text.rstrip().endswith(reader.template.eos)
    return text.rstrip() if ends else text


def _own(text: str, reader: Reader) -> tuple[Span, ...]:
    """All of such a text is the row's own; it is asked for where special tokens are."""
    return ((0, len(text)),) if reader.template.special_tokens.search(text) else ()


def _render_alpaca(row: Row, reader: Reader) -> list[Rendered]:
    context = row.get("input")
    if context is not None and not isinstance(context, str):
        raise RowError(f"input is {type(context).__name__}, expected text")
    _refuse_unread(row)
    block = f"### Input:\n{context}\n\n" if context else ""
    prompt = f"### Instruction:\n{_text(row, 'instruction')}\n\n{block}### Response:\n"
    return _exchange(prompt, _text(row, "output"), reader)


def _render_text(row: Row, reader: Reader) -> list[Rendered]:
    text = row["text"] or ""  # data sets of plain text have empty rows; they are dropped and counted
    if not isinstance(text, str):
        raise RowError(f"text is {type(text).__name__}, expected text")
    text = _ended(text, reader)
    return [Rendered(text, [(0, len(text))] if text else [], own=_own(text, reader))]


# ---------------------------------------------------------------------------------------------- conversations

# Columns that conversations are made of besides their turns. What else a template reads, it gets.
_FOR_CHAT = tuple(name for name in _WITH_MEANING if name != "history")
# Variables of templates that are no columns.
_NOT_FROM_ROWS = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}


def _conversation(row: Row, messages: list[Message], reader: Reader, first_target: int = 0) -> Conversation:
    """Give a template all that the row has for it."""
    template = reader.template
    _refuse_unread(row, read=_FOR_CHAT)
    tools = _tools(row)
    reads = template.reads(has_tools=bool(tools))
    if tools and "tools" not in reads:
        raise RowError("the chat template reads no tools, and the row has some: use a template that writes them")
    names = reads - _NOT_FROM_ROWS - set(template.tokenizer.special_tokens_map)
    variables = {name: row[name] for name in names if row.get(name) is not None and name not in _FOR_CHAT}
    documents = decoded(row.get("documents"), "documents")
    if documents:
        if "documents" not in reads:
            raise RowError("the chat template reads no documents, and the row has some")
        variables["documents"] = documents
    given = decoded(row.get("chat_template_kwargs"), "chat_template_kwargs") or {}
    if not isinstance(given, dict):
        raise RowError("chat_template_kwargs is no object")
    reserved = sorted(_NOT_FROM_ROWS.intersection(given))
    if reserved:
        raise RowError(
            f"chat_template_kwargs sets {', '.join(reserved)}, which it cannot: use a column, or take it out"
        )
    unread = sorted(set(given) - reads)
    if unread:
        raise RowError(f"the chat template does not read {', '.join(unread)}, which chat_template_kwargs sets")
    all_messages = _with_system(row, messages)
    if first_target:
        first_target += len(all_messages) - len(messages)
    return Conversation(tuple(all_messages), tools or None, variables | given, first_target)


def _tools(row: Row) -> list[Any]:
    found = [(name, value) for name in ("tools", "functions") if (value := decoded(row.get(name), name))]
    if not found:
        return []
    (name, tools), *others = found
    if others and others[0][1] != tools:
        raise RowError("the columns tools and functions say different things")
    if not isinstance(tools, list):
        raise RowError(f"{name} is no list of tools")
    tools = [decoded(tool, name) for tool in tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"{name} holds a tool that is no object")
    return tools


def _system(row: Row) -> str:
    texts = [value for name in ("system", "system_prompt") if (value := row.get(name))]
    if not all(isinstance(text, str) for text in texts) or len(set(texts)) > 1:
        raise RowError("system is not one text")
    return texts[0] if texts else ""


def _with_system(row: Row, messages: list[Message]) -> list[Message]:
    """Put the text of a column `system` first, unless it is there."""
    system = _system(row)
    if not system:
        return messages
    if messages[0].role != "system":
        return [Message({"role": "system", "content": system}), *messages]
    if messages[0].fields["content"] != system:
        raise RowError("the column system and the first message are two system prompts: keep one")
    return messages


def _render_prompt_completion(row: Row, reader: Reader) -> list[Rendered]:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        # TRL's conversational variant: only the completion's turns are learned.
        before, after = to_messages(prompt), to_messages(completion)
        conversation = _conversation(row, before + after, reader, first_target=len(before))
        return render_chat(conversation, reader.template, reader.sanitizes)
    _refuse_unread(row)
    return _exchange(_text(row, "prompt"), _text(row, "completion"), reader)


def _render_turns(column: str) -> Callable[[Row, Reader], list[Rendered]]:
    def render(row: Row, reader: Reader) -> list[Rendered]:
        return render_chat(_conversation(row, to_messages(row[column]), reader), reader.template, reader.sanitizes)

    return render


# In the order in which they are tried: tatsu-lab/alpaca also has a `text` column.
FORMATS = (
    RowFormat("messages", ("messages",), _render_turns("messages"), is_chat=True),
    RowFormat("conversations", ("conversations",), _render_turns("conversations"), is_chat=True),
    RowFormat("alpaca", ("instruction", "output"), _render_alpaca, ("input", *_WITH_MEANING)),
    RowFormat("prompt/completion", ("prompt", "completion"), _render_prompt_completion, _WITH_MEANING, is_chat=True),
    RowFormat("text", ("text",), _render_text),
)


def find_format(columns: Iterable[str], source: str) -> RowFormat:
    """Recognise the format of rows by their columns.

    Args:
        columns: the columns found.
        source: where they were found, for the message.

    Raises:
        DataError: listing the columns found and the formats known.
    """
    found = set(columns)
    for row_format in FORMATS:
        if found.issuperset(row_format.columns):
            return row_format
    known = "; ".join(f"{row_format.name} ({', '.join(row_format.columns)})" for row_format in FORMATS)
    raise DataError(
        f"{source} has the columns {', '.join(sorted(found))}, which fit no known format: {known}\n"
        "--columns ours=yours renames them, as in --columns instruction=question output=answer"
    )
