"""Conversations and rendered rows of the tests of formats."""

from transformers import PreTrainedTokenizerBase

from fullft.data.formats import FORMATS, Reader
from fullft.data.rendered import Rendered
from fullft.data.template import ChatTemplate

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}


def render_all(name: str, row: dict[str, object], tokenizer: PreTrainedTokenizerBase) -> list[Rendered]:
    row_format = next(row_format for row_format in FORMATS if row_format.name == name)
    return row_format.render(row, Reader(ChatTemplate(tokenizer)))


def render(name: str, row: dict[str, object], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    [rendered] = render_all(name, row, tokenizer)
    return rendered


def learned(rendered: Rendered) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.targets]
