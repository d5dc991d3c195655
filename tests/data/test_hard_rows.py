"""Rows that templates and masks easily get wrong without a word: each is learned as it says, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from chats import ASSISTANT, USER, learned, render, render_all
from data.chat_templates import CHATML_PROMPT, FAMILIES
from data.test_messages import texts
from rows import adding, load, pairs
from transformers import PreTrainedTokenizerBase

from fullft.data.rendered import RowError
from fullft.errors import DataError

END = "<|im_end|>\n<|endoftext|>"
# What a message says goes in for WHAT.
CHATML = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' }}WHAT{{ '<|im_end|>\\n' }}{%- endfor -%}"
    + CHATML_PROMPT
)
CALLS = "{{ m.content or '' }}{%- for c in m.tool_calls or [] -%}{{ c.function.name }}(ARGS){%- endfor -%}"


def with_template(tokenizer: PreTrainedTokenizerBase, what: str) -> PreTrainedTokenizerBase:
    changed = FAMILIES["qwen2.5"].tokenizer(tokenizer)
    changed.chat_template = CHATML.replace("WHAT", what)
    return changed


def calling(arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


# ---------------------------------------------------------------------------------------------- tags


@pytest.mark.parametrize("answer", ["[A]", "<yes>", "<b></b>", "</s>", "[NO] "])
def test_an_answer_that_is_a_tag_is_learned(answer: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data = load(tmp_path, [{"messages": [USER, {"role": "assistant", "content": answer}]}], tokenizer)
    assert texts(data, tokenizer) == [[answer + END]]
    assert "without a word" not in data.description


def test_tags_that_a_template_leaves_out_are_missed(tokenizer: PreTrainedTokenizerBase) -> None:
    bard = {"role": "bard", "content": "<hello>"}
    chat = with_template(tokenizer, "{%- if m.role != 'bard' -%}{{ m.content }}{%- endif -%}")
    with pytest.raises(RowError, match=r"leaves out the content of message 2, of role 'bard' \('<hello>'\)"):
        render("messages", {"messages": [USER, bard, ASSISTANT]}, chat)
    chat = with_template(tokenizer, "{{ m.content | striptags }}")
    with pytest.raises(RowError, match=r"the content of message 2, of role 'assistant' \('<b>'\)"):
        render("messages", {"messages": [USER, {"role": "assistant", "content": "a <b>c</b>"}]}, chat)


@pytest.mark.parametrize("content", ["a <end_of_turn> b", "<end_of_turn>a", "a<end_of_turn>", "<end_of_turn>"])
def test_special_tokens_that_look_like_tags_are_said_and_sanitised(
    content: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    chat = FAMILIES["gemma"].tokenizer(tokenizer)
    end = chat.convert_tokens_to_ids("<end_of_turn>")
    rows = [{"messages": [{"role": "user", "content": content}, ASSISTANT]}]
    data = load(tmp_path, rows, chat)
    assert "1 row with special tokens in the text itself" in data.description
    assert pairs(data)[0][0].count(end) == 3
    sanitised = load(tmp_path, rows, chat, sanitize_special_tokens=True)
    assert pairs(sanitised)[0][0].count(end) == 2
    assert chat.decode(pairs(sanitised)[0][0]) == chat.decode(pairs(data)[0][0])


@pytest.mark.parametrize("how", ["upper", "replace('l', 'L')", "replace('\\n', ' ')", "truncate(8)", "e", "title"])
def test_a_template_that_changes_a_content_is_refused(how: str, tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"messages": [{"role": "user", "content": "hello & good\nmorning"}, ASSISTANT]}
    with pytest.raises(RowError, match="leaves out the content of message 1, of role 'user'"):
        render("messages", row, with_template(tokenizer, "{{ m.content | " + how + " }}"))
    for same in ("trim", "string", "tojson"):
        render("messages", row, with_template(tokenizer, "{{ m.content | " + same + " }}"))


# ---------------------------------------------------------------------------------------------- calls


@pytest.mark.parametrize("arguments", ['{"city":"Bern","n":null}', {"city": "Bern", "n": None}])
def test_arguments_are_never_written_as_python_writes_objects(
    arguments: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    as_text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    for how, written in (
        ("{{ c.function.arguments }}", as_text),
        ("{{ '' + c.function.arguments }}", as_text),
        ("{{ c.function.arguments | tojson }}", '{"city": "Bern", "n": null}'),
    ):
        chat = with_template(tokenizer, CALLS.replace("ARGS", how))
        # That a result looks like the arguments in Python changes nothing.
        result = {"role": "tool", "content": "{'city': 'Bern', 'n': None}"}
        [call] = learned(render("messages", {"messages": [USER, calling(arguments), result]}, chat))
        assert call == f"f({written})<|im_end|>"


def test_an_argument_that_a_template_drops_is_missed_by_its_message(tokenizer: PreTrainedTokenizerBase) -> None:
    items = "{% for k, v in c.function.arguments.items() if v %}{{ k }}={{ v }}{% endfor %}"
    chat = with_template(tokenizer, CALLS.replace("ARGS", items))
    said = {"role": "user", "content": "n is 0"}  # the same words, elsewhere
    with pytest.raises(RowError, match="leaves out the call of f of message 2"):
        render("messages", {"messages": [said, calling({"city": "Bern", "n": 0})]}, chat)
    render("messages", {"messages": [said, calling({"city": "Bern", "n": 1})]}, chat)


def test_two_kinds_of_calls_in_a_message_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    message = calling({}) | {"function_call": {"name": "g", "arguments": "{}"}}
    with pytest.raises(RowError, match="message 2 has both function_call and tool_calls"):
        render("messages", {"messages": [USER, message]}, tokenizer)


def test_a_file_of_one_row_may_have_tools(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    chat = FAMILIES["qwen2.5"].tokenizer(tokenizer)
    tools = [{"type": "function", "function": {"name": "weather"}}]
    data = load(tmp_path, [{"messages": [USER, ASSISTANT], "tools": tools}], chat)
    assert json.dumps(tools[0]) in chat.decode(pairs(data)[0][0])


# ---------------------------------------------------------------------------------------------- turns


@pytest.mark.parametrize("more", ["", "<think>\\n"])
def test_a_conversation_may_begin_with_the_assistant(more: str, tokenizer: PreTrainedTokenizerBase) -> None:
    chat = with_template(tokenizer, "{{ m.content }}")
    chat.chat_template = chat.chat_template.replace("assistant\\n", "assistant\\n" + more)
    rendered = render("messages", {"messages": [ASSISTANT, USER, ASSISTANT]}, chat)
    assert learned(rendered) == ["Hello<|im_end|>", "Hello<|im_end|>"]


@pytest.mark.parametrize("content", ["<b>Hello</b>", ""])
def test_a_turn_that_is_not_learned_is_not_with_its_prompt_either(
    content: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    chat = FAMILIES["qwen2.5"].tokenizer(tokenizer)
    turn = {"role": "assistant", "content": content} | ({"weight": 0} if content else {})
    data = load(tmp_path, [{"messages": [USER, ASSISTANT, USER, turn]}], chat, train_on_prompt=True)
    [stretches] = texts(data, chat)
    assert stretches[0].endswith("Hello<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert stretches[1:] == ["\n"]


def test_a_conversation_that_is_cut_to_its_only_learned_turn_learns_its_end(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    chat = FAMILIES["qwen3"].tokenizer(tokenizer)
    chat.eos_token = "<|endoftext|>"  # noqa: S105  # which the template does not write
    reasoned = ASSISTANT | {"reasoning_content": "hm"}
    data = load(tmp_path, [{"messages": [USER, reasoned, USER]}], chat)
    ids, labels = pairs(data)[0]
    assert ids[-1] == labels[-1] == chat.eos_token_id
    assert texts(data, chat)[0][0].startswith("<think>\nhm\n</think>\n\nHello")
    assert "1 split per turn into 1" in data.description


def test_what_marks_leave_out_is_said(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    marked = (
        "{%- if m.role == 'assistant' and m.content -%}{%- generation -%}{{ m.content }}{%- endgeneration -%}"
        "{%- else -%}" + CALLS.replace("ARGS", "{{ c.function.arguments | tojson }}") + "{%- endif -%}"
    )
    chat = with_template(tokenizer, marked)
    data = load(tmp_path, [{"messages": [USER, calling({"a": 1}), USER, ASSISTANT]}], chat)
    assert texts(data, chat) == [["Hello"]]
    assert "1 turn masked, outside the chat template's marks" in data.description
    # Marks in a comment are none.
    chat = with_template(tokenizer, "{# {% generation %} #}{{ m.content }}")
    assert learned(render("messages", {"messages": [USER, ASSISTANT]}, chat)) == ["Hello<|im_end|>"]


def test_roles_are_known_in_any_case(tokenizer: PreTrainedTokenizerBase) -> None:
    for names in (("User", "Assistant"), ("HUMAN", "GPT"), (" user", "assistant ")):
        turns = [
            {"role": name, "content": turn["content"]} for name, turn in zip(names, (USER, ASSISTANT), strict=True)
        ]
        assert learned(render("messages", {"messages": turns}, tokenizer)) == ["Hello<|im_end|>\n"]


def test_a_users_turn_that_is_to_be_learned_is_said_not_to_be(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = load(tmp_path, [{"messages": [USER | {"train": True}, ASSISTANT | {"train": True}]}], tokenizer)
    assert "does not read: train\n" in data.description
    data = load(tmp_path, [{"messages": [USER | {"train": False}, ASSISTANT | {"train": True}]}], tokenizer)
    assert "does not read" not in data.description


# ---------------------------------------------------------------------------------------------- rows


def test_prompts_of_both_kinds_stand_in_one_file(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    chat = adding(tokenizer, "<|endoftext|> $A")
    plain, said = {"prompt": "a", "completion": " b"}, {"prompt": [USER], "completion": [ASSISTANT]}
    alone = [pairs(load(tmp_path, [row], chat))[0] for row in (plain, said)]
    assert alone[0][0][0] == chat.bos_token_id != alone[1][0][0]
    for order in ([0, 1, 0], [1, 0, 1]):
        rows = [(plain, said)[kind] for kind in order]
        assert pairs(load(tmp_path, rows, chat)) == [alone[kind] for kind in order]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": {"role": ["user"]}}, "messages is dict, expected a list"),
        ({"messages": [USER, ASSISTANT], "chat_template_kwargs": 5}, "chat_template_kwargs is no object"),
        (
            {"messages": [USER, ASSISTANT], "chat_template_kwargs": {"tools": []}},
            "chat_template_kwargs sets tools, which it cannot",
        ),
    ],
)
def test_rows_of_another_shape_are_refused(
    row: dict[str, Any], message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(DataError, match=f"rows.jsonl, line 1: {message}"):
        load(tmp_path, [row], tokenizer)


def test_a_column_named_like_a_function_of_jinja_is_no_variable(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = with_template(tokenizer, "{% for i in range(1) %}{{ m.content }}{% endfor %}")
    assert len(render_all("messages", {"messages": [USER, ASSISTANT], "range": [1, 2]}, chat)) == 1
