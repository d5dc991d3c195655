"""Conversations and rendered rows of the tests of formats."""

from transformers import PreTrainedTokenizerBase

from fullft.data.formats import FORMATS, Rendered

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}


def render(name: str, row: dict[str, object], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    return next(row_format for row_format in FORMATS if row_format.name == name).render(row, tokenizer)


def learned(rendered: Rendered) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.targets]
