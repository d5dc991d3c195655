"""Row formats: how a row becomes one text, and which stretches of it the model learns to write.

A format is recognised by its columns. `FORMATS` is the one place to add another.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from fullft.data.chat import render_chat, to_messages
from fullft.data.rendered import Rendered, Row, RowError
from fullft.errors import DataError


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
        messages = to_messages(row["prompt"], "role", "content") + to_messages(row["completion"], "role", "content")
        return render_chat(messages, tokenizer, first_target=len(row["prompt"]))
    return _exchange(_text(row, "prompt"), _text(row, "completion"))


def _render_messages(row: Row, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    return render_chat(to_messages(row["messages"], "role", "content"), tokenizer)


def _render_conversations(row: Row, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    turns = row["conversations"]
    from_value = isinstance(turns, list) and turns and isinstance(turns[0], dict) and "from" in turns[0]
    return render_chat(to_messages(turns, *(("from", "value") if from_value else ("role", "content"))), tokenizer)


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
