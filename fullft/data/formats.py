"""Row formats: how a row becomes one text, and which stretches of it the model learns to write.

Owns the formats and how one is recognised by its columns. `FORMATS` is the one place to add another. Tokenising is
`data.py`'s business; chat templates are the tokenizer's.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from fullft.data.sources import without_nulls
from fullft.errors import DataError

Row = dict[str, Any]
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class RowError(ValueError):
    """A row does not hold what its format needs; the caller knows which row it was."""


@dataclass(frozen=True)
class Rendered:
    """A row as text.

    Attributes:
        text: prompt and response in one string, so that they are tokenised together.
        targets: [start, end) character ranges of `text` that the model learns to write.
        has_special_tokens: whether the text already holds BOS and the like, as chat templates write them.
        ends_turn: whether EOS is already in the text behind the last response.
    """

    text: str
    targets: list[tuple[int, int]]
    has_special_tokens: bool = False
    ends_turn: bool = False


@dataclass(frozen=True)
class RowFormat:
    """One format: its name, the columns that give it away, and how it is rendered."""

    name: str
    columns: tuple[str, ...]
    render: Callable[[Row, PreTrainedTokenizerBase], Rendered]


# ---------------------------------------------------------------------------------------------- rendering


def _text(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise RowError(f"{column} is {'missing' if value is None else type(value).__name__}, expected text")
    return value


def _exchange(prompt: str, response: str) -> Rendered:
    return Rendered(prompt + response, [(len(prompt), len(prompt) + len(response))] if response else [])


def _render_alpaca(row: Row, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    context = row.get("input")
    if context is not None and not isinstance(context, str):
        raise RowError(f"input is {type(context).__name__}, expected text")
    block = f"### Input:\n{context}\n\n" if context else ""
    prompt = f"### Instruction:\n{_text(row, 'instruction')}\n\n{block}### Response:\n"
    return _exchange(prompt, _text(row, "output"))


def _render_prompt_completion(row: Row, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        # TRL's conversational variant: only the completion's turns are learned.
        messages = _messages(row["prompt"], "role", "content") + _messages(row["completion"], "role", "content")
        return _render_chat(messages, tokenizer, first_target=len(row["prompt"]))
    return _exchange(_text(row, "prompt"), _text(row, "completion"))


def _render_messages(row: Row, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    return _render_chat(_messages(row["messages"], "role", "content"), tokenizer)


def _render_conversations(row: Row, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    turns = row["conversations"]
    from_value = isinstance(turns, list) and turns and isinstance(turns[0], dict) and "from" in turns[0]
    return _render_chat(_messages(turns, *(("from", "value") if from_value else ("role", "content"))), tokenizer)


def _messages(turns: Any, role_key: str, content_key: str) -> list[dict[str, Any]]:
    """Bring turns to `role` and `content`, checking each; what else they hold is for the template to read."""
    if not isinstance(turns, list) or not turns:
        raise RowError("there are no messages")
    messages = []
    for number, turn in enumerate(turns, start=1):
        others = without_nulls(turn) if isinstance(turn, dict) else {}
        role, content = others.pop(role_key, None), others.pop(content_key, None)
        if content is None and "tool_calls" in others:
            content = ""  # a call says nothing beside
        if not isinstance(role, str) or not isinstance(content, str):
            raise RowError(f"message {number} needs {role_key!r} and {content_key!r} as text")
        messages.append({**others, "role": _ROLES.get(role, role), "content": content})
    return messages


def _render_chat(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, first_target: int = 0) -> Rendered:
    """Render by the tokenizer's chat template; the turns of the assistant are the targets.

    A turn begins where the template's generation prompt ends, and ends with its EOS, or, in templates that close turns
    otherwise, with everything the template writes for it.

    Raises:
        RowError: the template refuses the messages, or rewrites earlier turns, so that no turn has one place.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            "the rows are conversations and the tokenizer has no chat template: train an instruct model, or put the "
            "template that you want into chat_template.jinja in the model's folder"
        )
    text = _apply_template(messages, tokenizer)
    targets = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index < first_target:
            continue
        before = (
            _apply_template(messages[:index], tokenizer, add_generation_prompt=True)
            if index
            else _before_first_turn(message, tokenizer)
        )
        through = _apply_template(messages[: index + 1], tokenizer)
        if not text.startswith(before) or not text.startswith(through):
            raise RowError(
                f"the chat template writes message {index + 1} differently once others follow: split such rows so "
                "that each ends with the answer to learn"
            )
        targets.append((len(before), _end_of_turn(text, len(before), len(through), tokenizer)))
    eos = str(tokenizer.eos_token)
    return Rendered(text, targets, has_special_tokens=True, ends_turn=text.rstrip().endswith(eos))


def _before_first_turn(message: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """Give what a template writes before a conversation's first turn, when that is the assistant's.

    Templates refuse to prompt for a turn after none: the prompt is taken from behind the turn, and looked for in it.
    """
    turn = _apply_template([message], tokenizer)
    prompt = _apply_template([message], tokenizer, add_generation_prompt=True).removeprefix(turn)
    return turn[: turn.index(prompt) + len(prompt)] if prompt in turn else ""


def _end_of_turn(text: str, start: int, end: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Leave out the white space that templates put behind EOS: generation has stopped by then."""
    stripped = len(text[start:end].rstrip()) + start
    return stripped if text[start:stripped].endswith(str(tokenizer.eos_token)) else end


def _apply_template(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False
) -> str:
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # templates raise what they like, most often jinja2's TemplateError
        raise RowError(f"the chat template refuses it: {error}") from error
    return str(rendered)


def _render_text(row: Row, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    text = row["text"] or ""  # data sets of plain text have empty rows; they are dropped and counted
    if not isinstance(text, str):
        raise RowError(f"text is {type(text).__name__}, expected text")
    return Rendered(text, [(0, len(text))] if text else [])


# In the order in which they are tried: tatsu-lab/alpaca also has a `text` column.
FORMATS = (
    RowFormat("messages", ("messages",), _render_messages),
    RowFormat("conversations", ("conversations",), _render_conversations),
    RowFormat("alpaca", ("instruction", "output"), _render_alpaca),
    RowFormat("prompt/completion", ("prompt", "completion"), _render_prompt_completion),
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
