"""Conversations: the text of the chat template to the letter, and which of its characters are learned."""

import copy

import pytest
from chats import ASSISTANT, USER, learned, render
from transformers import PreTrainedTokenizerBase

from fullft.data.rendered import RowError
from fullft.errors import DataError

LLAMA_2 = (
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{%- else -%}{{ ' ' + m.content + ' ' + eos_token }}{%- endif -%}{%- endfor -%}"
)
REWRITES = (  # only the last answer keeps its content, as templates that drop earlier reasoning do
    "{%- for m in messages -%}{{ m.role + ':' + (m.content if loop.last or m.role == 'user' else '...') + '\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}assistant:{%- endif -%}"
)


def with_template(tokenizer: PreTrainedTokenizerBase, template: str | None, **tokens: str) -> PreTrainedTokenizerBase:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    for name, token in tokens.items():
        setattr(changed, name, token)
    return changed


# ---------------------------------------------------------------------------------------------- prompt/completion


def test_answers_in_a_conversational_prompt_are_not_learned(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    row = {"prompt": [USER, ASSISTANT, USER], "completion": [{"role": "assistant", "content": "Bye"}]}
    assert learned(render("prompt/completion", row, tokenizer)) == ["Bye<|im_end|>\n"]
    whole = {"messages": row["prompt"] + row["completion"]}
    assert learned(render("messages", whole, tokenizer)) == ["Hello<|im_end|>\n", "Bye<|im_end|>\n"]


# ---------------------------------------------------------------------------------------------- chat


def test_assistant_turns_are_learned_without_their_headers(tokenizer: PreTrainedTokenizerBase) -> None:
    system = {"role": "system", "content": "Be brief."}
    rendered = render("messages", {"messages": [system, USER, ASSISTANT, USER, ASSISTANT]}, tokenizer)
    exchange = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    assert rendered.text == "<|im_start|>system\nBe brief.<|im_end|>\n" + exchange + exchange
    assert learned(rendered) == ["Hello<|im_end|>\n"] * 2
    assert rendered.has_special_tokens
    assert not rendered.ends_turn  # its EOS is <|endoftext|>


def test_white_space_after_eos_is_not_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = with_template(tokenizer, tokenizer.chat_template, eos_token="<|im_end|>")
    rendered = render("messages", {"messages": [USER, ASSISTANT, USER, ASSISTANT]}, chat)
    assert learned(rendered) == ["Hello<|im_end|>"] * 2
    assert rendered.ends_turn


def test_a_template_without_generation_prompt_delimits_turns(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    chat = with_template(tokenizer, LLAMA_2)
    rendered = render("messages", {"messages": [USER, ASSISTANT]}, chat)
    assert rendered.text == "<|endoftext|>[INST] Hi [/INST] Hello <|endoftext|>"
    assert learned(rendered) == [" Hello <|endoftext|>"]
    assert rendered.ends_turn


def test_an_opening_answer_is_learned_without_its_header(
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


def test_a_conversation_without_answer_has_no_targets(tokenizer: PreTrainedTokenizerBase) -> None:
    assert render("messages", {"messages": [USER]}, tokenizer).targets == []


def test_a_missing_chat_template_is_a_data_error(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="no chat template: train an instruct model") as caught:
        render("messages", {"messages": [USER, ASSISTANT]}, with_template(tokenizer, None))
    assert caught.value.exit_code == 3


def test_a_template_that_loses_earlier_answers_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = with_template(tokenizer, REWRITES)
    with pytest.raises(RowError, match=r"leaves out the content of message 2, of role 'assistant' \('Hello'\)"):
        render("messages", {"messages": [USER, ASSISTANT, USER, ASSISTANT]}, chat)
    assert learned(render("messages", {"messages": [USER, ASSISTANT]}, chat)) == ["Hello\n"]  # nothing to rewrite


def test_a_template_that_refuses_the_messages_is_quoted(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = with_template(tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RowError, match="refuses it: roles must alternate"):
        render("messages", {"messages": [USER, ASSISTANT]}, chat)


def test_keys_that_arrow_filled_with_null_change_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    filled = [{**turn, "tool_calls": None, "name": None} for turn in (USER, ASSISTANT)]
    strict = with_template(
        tokenizer,
        "{% for m in messages %}{{ m.content }}{{ raise_exception('a call') if m.tool_calls is defined }}{% endfor %}",
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
