"""Messages: whatever a data set calls its turns, what they say is in the text, and what is learned is what they ask."""

import json
from pathlib import Path
from typing import Any

import pytest
from chats import ASSISTANT, USER, learned, render
from data.chat_templates import FAMILIES
from rows import IGNORED, load, pairs
from transformers import PreTrainedTokenizerBase

from fullft.data.formats import FORMATS, Reader
from fullft.data.rendered import RowError
from fullft.data.template import ChatTemplate
from fullft.errors import DataError

ARGUMENTS = {"city": "Bern", "days": 3, "unit": None}
CALL = {"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
ASKED = {"role": "user", "content": "Is it warm?"}
ANSWER = {"role": "assistant", "content": "18 degrees."}
RESULT = {"role": "tool", "content": '{"celsius": 18}'}
WRITTEN = (  # by hand, as Qwen2.5's template has it
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern", "days": 3, "unit": null}}\n</tool_call><|im_end|>'
)


@pytest.fixture
def qwen(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    return FAMILIES["qwen2.5"].tokenizer(tokenizer)


def texts(data: Any, tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
    """Return the learned stretches of each row, decoded."""
    found = []
    for _, labels in pairs(data):
        stretches: list[list[int]] = [[]]
        for label in labels:
            stretches[-1].append(label) if label != IGNORED else stretches.append([])
        found.append([tokenizer.decode(stretch) for stretch in stretches if stretch])
    return found


# ---------------------------------------------------------------------------------------------- calls and tools


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"type": "function", "function": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}},
        {"name": "weather", "arguments": ARGUMENTS},
        {"name": "weather", "parameters": ARGUMENTS},
        json.dumps(CALL),
    ],
    ids=["object", "arguments as text", "flat", "parameters", "text"],
)
@pytest.mark.parametrize("content", [None, "", "missing"])
def test_a_call_is_written_once_with_its_null_arguments(
    content: str | None, call: Any, tmp_path: Path, qwen: PreTrainedTokenizerBase
) -> None:
    turn = {"role": "assistant", "content": content, "tool_calls": [call]}
    if content == "missing":
        del turn["content"]
    row = {"messages": [ASKED, turn, RESULT, ANSWER], "tools": TOOLS}
    # The row after it has other keys: those must not reach it as nulls.
    other = {
        "messages": [USER, {"role": "assistant", "content": "Hello", "name": "x", "tool_calls": None}],
        "tools": None,
    }
    data = load(tmp_path, [row, other], qwen)
    assert texts(data, qwen) == [[WRITTEN, "18 degrees.<|im_end|>"], ["Hello<|im_end|>"]]
    text = qwen.decode(pairs(data)[0][0])
    assert json.dumps(TOOLS[0]) in text and "<tool_response>\n" + RESULT["content"] in text


def test_sharegpt_calls_equal_messages(qwen: PreTrainedTokenizerBase) -> None:
    said = json.dumps({"name": "weather", "arguments": ARGUMENTS})
    turns = [
        ("human", "Is it warm?"),
        ("function_call", said),
        ("observation", RESULT["content"]),
        ("gpt", "18 degrees."),
    ]
    conversations = [{"from": who, "value": value} for who, value in turns]
    rendered = render("conversations", {"conversations": conversations, "tools": json.dumps(TOOLS)}, qwen)
    messages = [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT, ANSWER]
    assert rendered == render("messages", {"messages": messages, "tools": TOOLS}, qwen)
    assert learned(rendered) == [WRITTEN, "18 degrees.<|im_end|>"]
    old = {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "weather", "arguments": json.dumps(ARGUMENTS)},
    }
    assert learned(render("messages", {"messages": [ASKED, old, RESULT, ANSWER]}, qwen)) == learned(rendered)


def test_a_template_that_wants_null_content_and_text_gets_them(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = FAMILIES["deepseek-v3"].tokenizer(tokenizer)
    messages = [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT, ANSWER]
    arguments = json.dumps(ARGUMENTS)
    assert learned(render("messages", {"messages": messages}, chat)) == [
        f"<|call|>weather\n{arguments}<|eos|>",
        "18 degrees.<|eos|>",
    ]


def test_tools_that_no_template_reads_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"messages": [USER, ASSISTANT], "tools": TOOLS}
    with pytest.raises(RowError, match="reads no tools, and the row has some"):
        render("messages", row, tokenizer)
    for nothing in (None, [], "", "[]"):
        render("messages", row | {"tools": nothing}, tokenizer)


def test_a_call_that_the_template_leaves_out_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}]}
    with pytest.raises(RowError, match=r"leaves out the call of weather of message 2, of role 'assistant'"):
        render("messages", row, tokenizer)


# ---------------------------------------------------------------------------------------------- roles


@pytest.mark.parametrize("role", ["bard", "developer"])
def test_a_role_that_the_template_leaves_out_is_named(role: str, qwen: PreTrainedTokenizerBase) -> None:
    # Its text is there, but as another message's.
    messages = [USER, {"role": role, "content": "Hello"}, USER, ASSISTANT]
    with pytest.raises(RowError, match=rf"leaves out the content of message 2, of role '{role}' \('Hello'\)"):
        render("messages", {"messages": messages}, qwen)


@pytest.mark.parametrize(
    ("theirs", "ours"), [("human", "user"), ("gpt", "assistant"), ("model", "assistant"), ("bot", "assistant")]
)
def test_known_names_of_roles_are_understood(theirs: str, ours: str, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"messages": [USER, {"role": role, "content": "Hello"}]} for role in (theirs, ours)]
    assert render("messages", rows[0], tokenizer) == render("messages", rows[1], tokenizer)


def test_a_column_system_comes_first(tokenizer: PreTrainedTokenizerBase) -> None:
    system = {"role": "system", "content": "Be brief."}
    expected = render("messages", {"messages": [system, USER, ASSISTANT]}, tokenizer)
    for row in (
        {"messages": [USER, ASSISTANT], "system": "Be brief."},
        {"messages": [system, USER, ASSISTANT], "system": "Be brief."},
        {"messages": [USER, ASSISTANT], "system_prompt": "Be brief."},
    ):
        assert render("messages", row, tokenizer) == expected
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    assert render("conversations", {"conversations": turns, "system": "Be brief."}, tokenizer) == expected
    with pytest.raises(RowError, match="two system prompts"):
        render("messages", {"messages": [system, USER, ASSISTANT], "system": "Talk."}, tokenizer)


@pytest.mark.parametrize(("name", "value"), [("system", "Be brief."), ("history", [["a", "b"]]), ("tools", TOOLS)])
@pytest.mark.parametrize("row", [{"instruction": "q", "output": "a"}, {"prompt": "q", "completion": "a"}])
def test_a_column_with_meaning_that_nothing_reads_is_refused(
    row: dict[str, Any], name: str, value: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(DataError, match=rf"rows.jsonl, line 2: nothing reads the column {name}"):
        load(tmp_path, [row, row | {name: value}], tokenizer)
    load(tmp_path, [row, row | {name: type(value)()}], tokenizer)


def test_columns_and_fields_that_nothing_reads_are_said(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    turn = ASSISTANT | {"timestamp": 7, "content": "Hello"}
    data = load(tmp_path, [{"messages": [USER, turn], "id": 3, "source": "x"}], tokenizer)
    assert "columns that nothing reads: id, source\n" in data.description
    assert "fields of messages that the chat template does not read: timestamp\n" in data.description


def test_variables_of_the_template_come_from_columns(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = FAMILIES["llama-3"].tokenizer(tokenizer)
    chat.chat_template = "{{ mood }}{{ documents[0].text if documents }}" + chat.chat_template
    row = {"messages": [USER, ASSISTANT], "mood": "calm", "documents": [{"title": "t", "text": "facts"}]}
    assert render("messages", row, chat).text.startswith("calmfacts<|begin_of_text|>")
    assert render("messages", {**row, "mood": None, "chat_template_kwargs": {"mood": "angry"}}, chat).text.startswith(
        "angry"
    )
    with pytest.raises(RowError, match="does not read noise, which chat_template_kwargs sets"):
        render("messages", {**row, "chat_template_kwargs": {"noise": 1}}, chat)
    with pytest.raises(RowError, match="reads no documents"):
        render("messages", row, tokenizer)


# ---------------------------------------------------------------------------------------------- what is not learned


@pytest.mark.parametrize(
    "flag", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": False}]
)
def test_a_flag_keeps_a_turn_out_of_the_loss(
    flag: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    messages = [USER, ASSISTANT | flag, USER, {"role": "assistant", "content": "Bye"}]
    data = load(tmp_path, [{"messages": messages}], tokenizer)
    assert texts(data, tokenizer) == [["Bye<|im_end|>\n<|endoftext|>"]]
    assert "1 turn masked by weight" in data.description
    # The last turn: neither it nor the EOS behind it.
    last = load(
        tmp_path, [{"messages": [USER, ASSISTANT, USER, {"role": "assistant", "content": "Bye"} | flag]}], tokenizer
    )
    assert texts(last, tokenizer) == [["Hello<|im_end|>\n"]]
    assert pairs(last)[0][0][-1] == tokenizer.eos_token_id
    # What is learned says so too.
    for learned_flag in ({"weight": 1}, {"train": True}):
        again = load(tmp_path, [{"messages": [USER, ASSISTANT | learned_flag]}], tokenizer)
        assert texts(again, tokenizer) == [["Hello<|im_end|>\n<|endoftext|>"]]
    # Under train_on_prompt too, and for users' turns.
    everything = load(tmp_path, [{"messages": [USER | flag, ASSISTANT]}], tokenizer, train_on_prompt=True)
    assert "Hi" not in "".join(texts(everything, tokenizer)[0])
    assert "user" in "".join(texts(everything, tokenizer)[0])


def test_marks_of_a_turn_with_a_flag_do_not_count(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    family = FAMILIES["llama-3"]
    chat = family.tokenizer(tokenizer)
    chat.chat_template = family.marked()
    messages = [USER, ASSISTANT | {"weight": 0}, USER, {"role": "assistant", "content": "Bye"}]
    assert texts(load(tmp_path, [{"messages": messages}], chat), chat) == [["Bye<|eot_id|>"]]


def test_a_weight_between_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(RowError, match=r"message 2 has weight 0.5: only 0 and 1"):
        render("messages", {"messages": [USER, ASSISTANT | {"weight": 0.5}]}, tokenizer)
    with pytest.raises(RowError, match="both that it is learned and that it is not"):
        render("messages", {"messages": [USER, ASSISTANT | {"weight": 0, "train": True}]}, tokenizer)


@pytest.mark.parametrize("end", [USER, {"role": "tool", "content": "18"}])
def test_no_eos_is_learned_behind_another_turn(
    end: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = load(tmp_path, [{"messages": [USER, ASSISTANT, end]}], tokenizer)
    ids, labels = pairs(data)[0]
    assert texts(data, tokenizer) == [["Hello<|im_end|>\n"]]
    assert (ids[-1], labels[-1]) == (tokenizer.eos_token_id, IGNORED)


@pytest.mark.parametrize("empty", [{"content": ""}, {"content": "  \n"}, {"content": "<think>hm</think>"}])
def test_a_turn_without_a_word_is_not_learned(
    empty: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    chat = FAMILIES["deepseek-r1"].tokenizer(tokenizer)
    silent = {"role": "assistant"} | empty
    data = load(tmp_path, [{"messages": [USER, ASSISTANT]}, {"messages": [USER, silent]}], chat)
    assert texts(data, chat) == [["Hello<|eos|>"]] and "1 dropped" in data.description
    data = load(tmp_path, [{"messages": [USER, silent, USER, ASSISTANT]}], chat)
    assert texts(data, chat) == [["Hello<|eos|>"]]
    assert "1 turn masked, without a word" in data.description


# ---------------------------------------------------------------------------------------------- parts, JSON text


@pytest.mark.parametrize("name", ["gemma-3", "gemma", "qwen2.5"])
def test_content_in_parts_equals_text(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    chat = FAMILIES[name].tokenizer(tokenizer)
    parts = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in (USER, ASSISTANT)]
    assert render("messages", {"messages": parts}, chat) == render("messages", {"messages": [USER, ASSISTANT]}, chat)
    several = [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, parts[1]]
    assert render("messages", {"messages": several}, chat) == render("messages", {"messages": parts}, chat)


def test_other_parts_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    for part, message in (
        ({"type": "image", "url": "x"}, "message 1 has a part of type image: only text can be trained on"),
        ({"type": "thought", "thought": "x"}, "parts of the types thought, and the chat template takes text alone"),
    ):
        with pytest.raises(RowError, match=message):
            render("messages", {"messages": [{"role": "user", "content": [part]}, ASSISTANT]}, tokenizer)


def test_messages_as_json_text_equal_messages(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    expected = load(tmp_path, [{"messages": [USER, ASSISTANT]}], tokenizer)
    assert pairs(load(tmp_path, [{"messages": json.dumps([USER, ASSISTANT])}], tokenizer)) == pairs(expected)
    with pytest.raises(DataError, match=r"line 1: messages is text that is no JSON"):
        load(tmp_path, [{"messages": "Hi"}], tokenizer)


# ---------------------------------------------------------------------------------------------- special tokens


def test_special_tokens_in_the_rows_are_said_once(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"messages": [USER, ASSISTANT]}] + [
        {"messages": [{"role": "user", "content": "a <|im_end|> b"}, ASSISTANT]}
    ] * 2
    data = load(tmp_path, rows, tokenizer)
    assert "2 rows with special tokens in the text itself" in data.description
    assert "rows.jsonl, line 2)" in data.description and data.description.count("special tokens") == 1
    assert "special tokens" not in load(tmp_path, rows[:1], tokenizer).description


@pytest.mark.parametrize("who", ["user", "assistant"])
def test_sanitised_special_tokens_are_plain_text(who: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    said = [
        turn if turn["role"] != who else turn | {"content": "<|im_end|>a <|im_end|> b"} for turn in (USER, ASSISTANT)
    ]
    plain = load(tmp_path, [{"messages": said}], tokenizer)
    data = load(tmp_path, [{"messages": said}], tokenizer, sanitize_special_tokens=True)
    ids, labels = pairs(data)[0]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == 2 and pairs(plain)[0][0].count(end) == 4
    assert tokenizer.decode(ids) == tokenizer.decode(pairs(plain)[0][0])
    answer = "<|im_end|>a <|im_end|> b" if who == "assistant" else "Hello"
    assert texts(data, tokenizer) == [[answer + "<|im_end|>\n<|endoftext|>"]]
    assert labels.count(end) == 1
    # transformers' own way to do it gives the same ids.
    if hasattr(tokenizer, "_mark_chat_inputs"):
        theirs = tokenizer.apply_chat_template(said, return_dict=True, sanitize_control_tokens=True)["input_ids"]
        assert ids == [*theirs, tokenizer.eos_token_id]


def test_sanitised_rows_without_a_template_learn_the_same_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    row = {"prompt": "what ends <|im_end|> it?", "completion": " this: <|endoftext|> does"}
    data = load(tmp_path, [row], tokenizer, sanitize_special_tokens=True)
    ids, labels = pairs(data)[0]
    assert (
        ids.count(tokenizer.eos_token_id) == 1
        and tokenizer.decode(ids) == row["prompt"] + row["completion"] + "<|endoftext|>"
    )
    assert texts(data, tokenizer) == [[row["completion"] + "<|endoftext|>"]]
    assert pairs(load(tmp_path, [{"text": "a b"}], tokenizer, sanitize_special_tokens=True)) == pairs(
        load(tmp_path, [{"text": "a b"}], tokenizer)
    )


def test_special_tokens_in_tools_cannot_be_sanitised(qwen: PreTrainedTokenizerBase) -> None:
    tool = {"type": "function", "function": {"name": "weather", "description": "ends <|im_end|>"}}
    row = {"messages": [USER, ASSISTANT], "tools": [tool]}
    reader = Reader(ChatTemplate(qwen), sanitizes=True)
    with pytest.raises(RowError, match="special tokens in the row's tools"):
        FORMATS[0].render(row, reader)
    assert FORMATS[0].render({"messages": [USER, ASSISTANT]}, reader)
