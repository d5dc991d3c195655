"""Row formats: the text of a row to the letter, and which of its characters are learned."""

import pytest
from chats import learned, render
from transformers import PreTrainedTokenizerBase

from fullft.data.formats import find_format
from fullft.data.rendered import RowError
from fullft.errors import DataError

# ---------------------------------------------------------------------------------------------- alpaca


@pytest.mark.parametrize("row", [{}, {"input": ""}, {"input": None}], ids=["missing", "empty", "null"])
def test_an_alpaca_row_without_input_is_rendered_literally(
    row: dict[str, object], tokenizer: PreTrainedTokenizerBase
) -> None:
    rendered = render("alpaca", {"instruction": "Add 1 and 2.", "output": "3", **row}, tokenizer)
    assert rendered.text == "### Instruction:\nAdd 1 and 2.\n\n### Response:\n3"
    assert learned(rendered) == ["3"]


def test_an_alpaca_row_with_input_has_its_block(tokenizer: PreTrainedTokenizerBase) -> None:
    rendered = render("alpaca", {"instruction": "Add.", "input": "1, 2", "output": "3\n"}, tokenizer)
    assert rendered.text == "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n3\n"
    assert learned(rendered) == ["3\n"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a", "output": None}, "output is missing"),
        ({"instruction": 5, "output": "b"}, "instruction is int"),
        ({"instruction": "a", "input": ["x"], "output": "b"}, "input is list"),
    ],
)
def test_a_value_that_is_no_text_is_named(
    row: dict[str, object], message: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(RowError, match=message):
        render("alpaca", row, tokenizer)


# ---------------------------------------------------------------------------------------------- prompt/completion


def test_prompt_and_completion_are_joined_with_nothing_between(tokenizer: PreTrainedTokenizerBase) -> None:
    rendered = render("prompt/completion", {"prompt": "1 + 1 =", "completion": " 2"}, tokenizer)
    assert (rendered.text, learned(rendered)) == ("1 + 1 = 2", [" 2"])


def test_an_empty_completion_has_nothing_to_learn(tokenizer: PreTrainedTokenizerBase) -> None:
    assert render("prompt/completion", {"prompt": "a", "completion": ""}, tokenizer).targets == []


# ---------------------------------------------------------------------------------------------- recognising


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (["instruction", "input", "output", "text"], "alpaca"),  # tatsu-lab/alpaca
        (["output", "instruction"], "alpaca"),
        (["prompt", "completion"], "prompt/completion"),
        (["prompt", "messages", "prompt_id"], "messages"),  # HuggingFaceH4/ultrachat_200k
        (["id", "conversations"], "conversations"),
        (["text", "url", "timestamp"], "text"),
    ],
)
def test_a_format_is_recognised_by_its_columns(columns: list[str], name: str) -> None:
    assert find_format(columns, "rows").name == name


def test_unknown_columns_are_listed_with_the_formats_known() -> None:
    with pytest.raises(DataError) as caught:
        find_format(["question", "answer"], "rows.jsonl")
    message = str(caught.value)
    assert "rows.jsonl has the columns answer, question" in message
    for expected in (
        "alpaca (instruction, output)",
        "prompt/completion (prompt, completion)",
        "text (text)",
        "--columns",
    ):
        assert expected in message
