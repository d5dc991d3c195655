"""Row formats: the text of a row to the letter, and which of its characters are learned."""

import copy

import pytest
from transformers import PreTrainedTokenizerBase

from fullft.data.formats import FORMATS, Rendered, RowError, find_format
from fullft.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
LLAMA_2 = (
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{%- else -%}{{ ' ' + m.content + ' ' + eos_token }}{%- endif -%}{%- endfor -%}"
)
REWRITES = (  # only the last answer keeps its content, as templates that drop earlier reasoning do
    "{%- for m in messages -%}{{ m.role + ':' + (m.content if loop.last or m.role == 'user' else '...') + '\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}assistant:{%- endif -%}"
)


def render(name: str, row: dict[str, object], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    return next(row_format for row_format in FORMATS if row_format.name == name).render(row, tokenizer)


def learned(rendered: Rendered) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.targets]


def with_template(tokenizer: PreTrainedTokenizerBase, template: str | None, **tokens: str) -> PreTrainedTokenizerBase:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    for name, token in tokens.items():
        setattr(changed, name, token)
    return changed


# ---------------------------------------------------------------------------------------------- alpaca


@pytest.mark.parametrize("row", [{}, {"input": ""}, {"input": None}], ids=["missing", "empty", "null"])
def test_an_alpaca_row_without_input_is_the_lessons_prompt_to_the_letter(
    row: dict[str, object], tokenizer: PreTrainedTokenizerBase
) -> None:
    rendered = render("alpaca", {"instruction": "Add 1 and 2.", "output": "3", **row}, tokenizer)
    assert rendered.text == "### Instruction:\nAdd 1 and 2.\n\n### Response:\n3"
    assert learned(rendered) == ["3"]


def test_an_alpaca_row_with_input_has_the_input_block_to_the_letter(tokenizer: PreTrainedTokenizerBase) -> None:
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


def test_conversational_completions_are_learned_and_answers_in_the_prompt_are_not(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    row = {"prompt": [USER, ASSISTANT, USER], "completion": [{"role": "assistant", "content": "Bye"}]}
    assert learned(render("prompt/completion", row, tokenizer)) == ["Bye<|im_end|>\n"]
    whole = {"messages": row["prompt"] + row["completion"]}
    assert learned(render("messages", whole, tokenizer)) == ["Hello<|im_end|>\n", "Bye<|im_end|>\n"]


# ---------------------------------------------------------------------------------------------- chat


def test_assistant_turns_are_learned_and_their_headers_are_not(tokenizer: PreTrainedTokenizerBase) -> None:
    system = {"role": "system", "content": "Be brief."}
    rendered = render("messages", {"messages": [system, USER, ASSISTANT, USER, ASSISTANT]}, tokenizer)
    exchange = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    assert rendered.text == "<|im_start|>system\nBe brief.<|im_end|>\n" + exchange + exchange
    assert learned(rendered) == ["Hello<|im_end|>\n"] * 2
    assert rendered.has_special_tokens
    assert not rendered.ends_turn  # its EOS is <|endoftext|>


def test_white_space_behind_a_turns_eos_is_not_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = with_template(tokenizer, tokenizer.chat_template, eos_token="<|im_end|>")
    rendered = render("messages", {"messages": [USER, ASSISTANT, USER, ASSISTANT]}, chat)
    assert learned(rendered) == ["Hello<|im_end|>"] * 2
    assert rendered.ends_turn


def test_a_turn_begins_behind_the_prompt_and_ends_with_eos_in_a_template_without_generation_prompt(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    chat = with_template(tokenizer, LLAMA_2)
    rendered = render("messages", {"messages": [USER, ASSISTANT]}, chat)
    assert rendered.text == "<|endoftext|>[INST] Hi [/INST] Hello <|endoftext|>"
    assert learned(rendered) == [" Hello <|endoftext|>"]
    assert rendered.ends_turn


def test_an_answer_that_opens_the_conversation_is_learned_without_its_header(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    rendered = render("messages", {"messages": [ASSISTANT, USER, ASSISTANT]}, tokenizer)
    assert learned(rendered) == ["Hello<|im_end|>\n"] * 2


def test_sharegpt_turns_equal_messages(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [("system", "S"), ("human", "Hi"), ("gpt", "Hello")]
    conversation = render(
        "conversations", {"conversations": [{"from": who, "value": said} for who, said in turns]}, tokenizer
    )
    messages = render("messages", {"messages": [{"role": "system", "content": "S"}, USER, ASSISTANT]}, tokenizer)
    assert conversation == messages
    by_role = render(
        "conversations", {"conversations": [{"role": "system", "content": "S"}, USER, ASSISTANT]}, tokenizer
    )
    assert by_role == messages


def test_a_conversation_without_an_answer_has_nothing_to_learn(tokenizer: PreTrainedTokenizerBase) -> None:
    assert render("messages", {"messages": [USER]}, tokenizer).targets == []


def test_a_tokenizer_without_chat_template_is_a_data_error_with_a_remedy(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="no chat template: train an instruct model") as caught:
        render("messages", {"messages": [USER, ASSISTANT]}, with_template(tokenizer, None))
    assert caught.value.exit_code == 3


def test_a_template_that_rewrites_earlier_turns_is_refused_where_it_does(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = with_template(tokenizer, REWRITES)
    with pytest.raises(RowError, match="writes message 2 differently once others follow"):
        render("messages", {"messages": [USER, ASSISTANT, USER, ASSISTANT]}, chat)
    assert learned(render("messages", {"messages": [USER, ASSISTANT]}, chat)) == ["Hello\n"]  # nothing to rewrite


def test_a_template_that_refuses_the_messages_is_quoted(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = with_template(tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RowError, match="refuses it: roles must alternate"):
        render("messages", {"messages": [USER, ASSISTANT]}, chat)


def test_keys_that_arrow_filled_with_null_change_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    filled = [{**turn, "tool_calls": None, "name": None} for turn in (USER, ASSISTANT)]
    strict = with_template(
        tokenizer, "{% for m in messages %}{{ raise_exception('a call') if m.tool_calls is defined }}{% endfor %}"
    )
    render("messages", {"messages": filled}, strict)
    assert render("messages", {"messages": filled}, tokenizer) == render(
        "messages", {"messages": [USER, ASSISTANT]}, tokenizer
    )


def test_tool_calls_reach_the_template(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = with_template(
        tokenizer,
        "{% for m in messages %}{{ m.role + ':' + m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function | tojson }}{% endfor %}{{ eos_token }}{% endfor %}",
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "unit": None}}]}
    assert learned(render("messages", {"messages": [USER, call]}, chat)) == ['assistant:{"name": "add"}<|endoftext|>']


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "there are no messages"),
        (None, "there are no messages"),
        ([USER, {"role": "assistant", "content": None}], "message 2 needs 'role' and 'content' as text"),
        ([USER, "Hello"], "message 2 needs"),
        ([{"content": "Hi"}], "message 1 needs"),
    ],
)
def test_a_message_that_lacks_something_is_named(
    turns: object, message: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(RowError, match=message):
        render("messages", {"messages": turns}, tokenizer)


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
