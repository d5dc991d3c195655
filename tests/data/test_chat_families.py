"""Chat templates of the field's shapes: what is learned is what transformers finds in the template with marks."""

from pathlib import Path
from typing import Any

import pytest
from data.chat_templates import FAMILIES, Family
from rows import load, pairs
from transformers import PreTrainedTokenizerBase

IGNORED = -100
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello <b>there</b>"},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
]
REASONED = [turn | ({"reasoning_content": f"let me see {i}"} if i % 2 else {}) for i, turn in enumerate(TURNS)]
Messages = list[dict[str, Any]]


def by_transformers(
    messages: Messages, family: Family, tokenizer: PreTrainedTokenizerBase, last_turn_alone: bool = False
) -> tuple[list[int], list[int]]:
    """Let transformers find the marks, and add EOS where the text does not end with it."""
    # Since 5.23 transformers gives gpt-oss the name that it reads; here all versions do.
    messages = [
        {"thinking": turn["reasoning_content"], **turn} if "reasoning_content" in turn else turn for turn in messages
    ]
    encoded = tokenizer.apply_chat_template(
        messages, chat_template=family.marked(), return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = list(encoded["input_ids"]), list(encoded["assistant_masks"])
    assert any(mask)
    if last_turn_alone:
        first = max(i for i in range(len(mask)) if mask[i] and not mask[i - 1])
        mask = [int(bool(marked) and place >= first) for place, marked in enumerate(mask)]
    if not tokenizer.decode(ids).rstrip().endswith(family.eos):
        ids, mask = [*ids, tokenizer.eos_token_id], [*mask, 1]
    return ids, [token if marked else IGNORED for token, marked in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("first", [[], [{"role": "system", "content": "Be brief."}]], ids=["", "system"])
@pytest.mark.parametrize("count", [2, 4], ids=["one turn", "two turns"])
def test_a_conversation_is_learned_where_its_template_is_marked(
    count: int, first: Messages, family: Family, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    if first and "only user and assistant" in family.source:
        return
    chat = family.tokenizer(tokenizer)
    messages = first + TURNS[:count]
    expected = [by_transformers(messages, family, chat)]
    if family.rewrites and count > 2:
        ends = [len(first) + 2, len(first) + 4]
        expected = [by_transformers(messages[:end], family, chat, last_turn_alone=True) for end in ends]
    data = load(tmp_path, [{"messages": messages}], chat)
    assert pairs(data) == expected
    said = "1 split per turn into 2" in data.description
    assert said == (family.rewrites and count > 2)
    chat.chat_template = family.marked()
    assert pairs(load(tmp_path, [{"messages": messages}], chat)) == [by_transformers(messages, family, chat)]


REASONING = [name for name, family in FAMILIES.items() if family.rewrites or family.rewrites_reasoning]


@pytest.mark.parametrize("name", REASONING)
@pytest.mark.parametrize("inline", [False, True])
def test_reasoning_that_earlier_turns_lose_is_learned_in_a_row_of_its_own(
    inline: bool, name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    family = FAMILIES[name]
    if inline and "thinking" in family.source:
        return  # gpt-oss takes no reasoning in the content
    chat = family.tokenizer(tokenizer)
    messages = REASONED
    if inline:
        messages = [
            {"role": turn["role"], "content": f"<think>\n{turn['reasoning_content']}\n</think>\n\n{turn['content']}"}
            if "reasoning_content" in turn
            else turn
            for turn in REASONED
        ]
    expected = [by_transformers(messages[:end], family, chat, last_turn_alone=True) for end in (2, 4)]
    rows = pairs(load(tmp_path, [{"messages": messages}], chat))
    assert rows == expected
    for number, (ids, labels) in enumerate(rows):
        text = chat.decode([token for token in labels if token != IGNORED])
        assert f"let me see {2 * number + 1}" in text
        assert ("let me see 1" in chat.decode(ids)) == (number == 0)


@pytest.mark.parametrize("name", ["deepseek-r1", "llama-3", "mistral", "gemma"])
def test_reasoning_that_no_turn_keeps_is_refused(name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    chat = FAMILIES[name].tokenizer(tokenizer)
    messages = REASONED[:2]
    if name == "deepseek-r1":
        messages = [messages[0], {"role": "assistant", "content": "<think>let me see 1</think>Hello"}]
    with pytest.raises(
        Exception, match=r"leaves out the reasoning of message 2, of role 'assistant' \('let me see 1'\)"
    ):
        load(tmp_path, [{"messages": messages}], chat)
