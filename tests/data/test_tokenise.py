"""Tokenising: token ids and labels against plain tokenizer calls, lengths, errors with their place, the cache."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from models import make_config
from rows import (
    EOS,
    IGNORED,
    Row,
    adding,
    begins_by_bytes,
    completions,
    count_calls,
    expected_pair,
    load,
    numbered,
    pairs,
    without_first,
    write_rows,
)
from transformers import PreTrainedTokenizerBase

from fullft.data.load import load_data
from fullft.errors import DataError

# ---------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("Question: what is two and two? ", "Four."),
        (
            "Say \N{GRINNING FACE} and é: ",
            "\N{GRINNING FACE}\N{GRINNING FACE} né \N{THUMBS UP SIGN}\N{EMOJI MODIFIER FITZPATRICK TYPE-5} da",
        ),
        ("漢字", "かな and 漢字"),
        ("windows\r\n", "line\r\nends\r\n"),
        ("a\n\n", "\n\nb"),
    ],
)
def test_labels_mark_the_response_tokenised_with_its_prompt(
    prompt: str, response: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = load(tmp_path, completions((prompt, response)), tokenizer)
    assert pairs(data) == [expected_pair(prompt, response, tokenizer)]


def test_an_alpaca_row_learns_its_output_alone(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data = load(tmp_path, [{"instruction": "Add.", "input": "1, 2", "output": "3"}], tokenizer)
    prompt = "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n"
    assert pairs(data) == [expected_pair(prompt, "3", tokenizer)]


def test_a_token_across_the_boundary_is_not_learned(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt, response = "I see th", "e end"
    together = tokenizer(prompt + response).input_ids
    apart = tokenizer(prompt).input_ids + tokenizer(response).input_ids
    assert together != apart  # else this tests nothing
    ((ids, labels),) = pairs(load(tmp_path, completions((prompt, response)), tokenizer))
    assert ids == [*together, EOS]
    learned = [token for token in labels if token != IGNORED]
    assert tokenizer.decode(learned) == " end<|endoftext|>"


def test_prompts_are_learned_with_train_on_prompt_alone(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = completions(("the prompt ", "the response"))
    ((ids, labels),) = pairs(load(tmp_path, rows, tokenizer, train_on_prompt=True))
    assert labels == without_first(ids)
    ((same_ids, fewer_labels),) = pairs(load(tmp_path, rows, tokenizer))
    assert same_ids == ids
    assert fewer_labels.count(IGNORED) > 1


def test_eos_is_learned_even_where_it_pads(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == EOS
    rows = completions(("a", " b"), ("a", " b c d e f g h i j"))
    data = load(tmp_path, rows, tokenizer, per_device_train_batch_size=2)
    (micro_batch,) = data.train.by_length()
    short, long = (len(ids) for ids, _ in pairs(data))
    assert micro_batch.inputs["input_ids"][0, short - 1 :].tolist() == [EOS] * (long - short + 1)
    assert micro_batch.labels[0, short - 1 :].tolist() == [EOS] + [IGNORED] * (long - short)
    assert micro_batch.labels[1, -1] == EOS
    # Masking by id, as collators do, would lose both.
    assert (micro_batch.labels == EOS).sum() == 2


def test_a_missing_pad_token_changes_nothing(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    rows = completions(("a", " b"), ("a", " b c d"))
    batches = [
        load(tmp_path, rows, each, per_device_train_batch_size=2).train.by_length() for each in (tokenizer, bare)
    ]
    for left, right in zip(*batches, strict=True):
        assert torch.equal(left.inputs["input_ids"], right.inputs["input_ids"])
        assert torch.equal(left.labels, right.labels)


# ---------------------------------------------------------------------------------------------- special tokens


def test_an_added_bos_comes_once_and_is_unlearned(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt, response = "the prompt ", "the response"
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    data = load(tmp_path, completions((prompt, response)), adding(tokenizer, "<|im_start|> $A"))
    ids, labels = expected_pair(prompt, response, tokenizer)
    assert pairs(data) == [([start, *ids], [IGNORED, *labels])]


@pytest.mark.parametrize("train_on_prompt", [False, True])
def test_added_tokens_other_than_eos_are_never_learned(
    train_on_prompt: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    chat = adding(tokenizer, "<|endoftext|> <|im_start|> $A <|im_start|>")
    ((ids, labels),) = pairs(load(tmp_path, [{"text": "some text"}], chat, train_on_prompt=train_on_prompt))
    assert labels == [IGNORED, IGNORED, *ids[2:-2], IGNORED, EOS]
    assert ids[2:-2] == tokenizer("some text").input_ids


def test_an_added_eos_is_learned_and_not_doubled(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = completions(("the prompt ", "the response"))
    plain = pairs(load(tmp_path, rows, tokenizer))
    assert pairs(load(tmp_path, rows, adding(tokenizer, "$A <|endoftext|>"))) == plain
    assert plain[0][0].count(EOS) == plain[0][1].count(EOS) == 1


def test_an_eos_in_the_rows_is_not_doubled(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    plain = pairs(load(tmp_path, completions(("the prompt ", "the response")), tokenizer))
    assert pairs(load(tmp_path, completions(("the prompt ", "the response<|endoftext|>")), tokenizer)) == plain


@pytest.mark.parametrize("added", ["<|im_start|> $A", "$A <|endoftext|>", "<|im_start|> $A <|endoftext|>"])
@pytest.mark.parametrize("front", ["", "<|im_start|>"])
@pytest.mark.parametrize("back", ["", "<|endoftext|>"])
def test_special_tokens_at_the_edges_stand_once(
    back: str, front: str, added: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    bos = tokenizer.convert_tokens_to_ids("<|im_start|>")
    changed = adding(tokenizer, added)
    has_bos = bool(front) or "im_start" in added
    middle = tokenizer("one two").input_ids
    expected = [*[bos] * has_bos, *middle, EOS]
    assert pairs(load(tmp_path, [{"text": f"{front}one two{back}"}], changed)) == [(expected, without_first(expected))]
    data = load(tmp_path, completions((f"{front}one", f" two{back}")), changed)
    count = len(tokenizer("one").input_ids) + has_bos
    assert pairs(data) == [(expected, [IGNORED] * count + expected[count:])]
    assert "special tokens" not in data.description  # at the edges they were meant
    # Within the text they stay.
    inside = load(tmp_path, [{"text": "one<|im_start|> two"}], changed)
    assert pairs(inside)[0][0].count(bos) == 1 + ("im_start" in added)
    assert "1 row with special tokens in the text itself" in inside.description


def test_chatml_turns_are_learned_and_eos_is_added(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [("system", "S"), ("user", "Hi"), ("assistant", "Hello"), ("user", "And?"), ("assistant", "Bye")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in turns]}]
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    ids, begins = begins_by_bytes(text, tokenizer)
    answers = [(text.index("Hello"), text.index("<|im_start|>user\nAnd")), (text.index("Bye"), len(text))]
    labels = [
        token if any(start <= begin < end for start, end in answers) else IGNORED
        for token, begin in zip(ids, begins, strict=True)
    ]
    assert pairs(load(tmp_path, rows, tokenizer)) == [([*ids, EOS], [*labels, EOS])]


def test_a_turn_ending_with_eos_gets_no_other(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    chat = adding(tokenizer, "<|im_start|> $A <|endoftext|>")  # templates write special tokens themselves
    chat.eos_token = "<|im_end|>"
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}]
    ((ids, labels),) = pairs(load(tmp_path, rows, chat))
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    assert ids == tokenizer(text).input_ids
    assert tokenizer.decode([token for token in labels if token != IGNORED]) == "Hello<|im_end|>"


def test_a_data_error_reaches_the_caller_unwrapped(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}]
    with pytest.raises(DataError, match="the tokenizer has no chat template") as caught:
        load(tmp_path, rows, bare)
    assert caught.value.exit_code == 3


# ---------------------------------------------------------------------------------------------- lengths


def test_a_row_cut_at_max_length_lacks_eos(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt, response = "p ", "a b c d e f g h i j"
    ids, labels = expected_pair(prompt, response, tokenizer)
    data = load(tmp_path, completions((prompt, response)), tokenizer, max_length=8)
    assert pairs(data) == [(ids[:8], labels[:8])]
    assert "1 cut at 8" in data.description
    fitting = load(tmp_path, completions((prompt, response)), tokenizer, max_length=len(ids))
    assert pairs(fitting) == [(ids, labels)]
    assert f"0 cut at {len(ids)}" in fitting.description


def test_rows_without_targets_are_dropped_and_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = completions(("p ", "r"), ("p ", ""), ("a long prompt " * 5, "r"), ("p ", "s"))
    data = load(tmp_path, rows, tokenizer, max_length=16)
    assert [tokenizer.decode(ids) for ids, _ in pairs(data)] == ["p r<|endoftext|>", "p s<|endoftext|>"]
    assert "4 rows" in data.description and "2 dropped" in data.description and "0 cut" in data.description


def test_a_thousand_empty_first_rows_do_no_harm(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    # The library infers column types from the first thousand rows, unless told.
    data = load(tmp_path, completions(*[("p ", "")] * 1000, ("p ", "r")), tokenizer)
    assert pairs(data) == [expected_pair("p ", "r", tokenizer)]


@pytest.mark.parametrize("max_length", [8, 16, 1000])
def test_text_is_split_into_pieces_ending_with_eos(
    max_length: int, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    text = "The quick brown fox jumps over the lazy dog. \N{GRINNING FACE} " * 3
    ids = [*tokenizer(text).input_ids, EOS]
    assert len(ids) % max_length != 1
    pieces = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
    data = load(tmp_path, [{"text": text}], tokenizer, max_length=max_length)
    assert pairs(data) == [(piece, without_first(piece)) for piece in pieces]
    assert "0 dropped" in data.description and "0 cut" in data.description


def test_a_last_piece_of_eos_alone_is_dropped(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    text = "The quick brown fox jumps over"
    ids = tokenizer(text).input_ids
    data = load(tmp_path, [{"text": text}], tokenizer, max_length=len(ids))
    assert pairs(data) == [(ids, without_first(ids))]


def test_empty_and_null_texts_are_dropped(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data = load(tmp_path, [{"text": "a b"}, {"text": ""}, {"text": None}], tokenizer)
    assert len(data.train.rows) == 1 and "2 dropped" in data.description


def test_a_megabyte_of_text_is_all_there(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    text = "".join(f"{i} bottles of beer on the wall.\n" for i in range(32_000))
    assert len(text) > 1_000_000
    (tmp_path / "a.txt").write_text(text)
    data = load_data(make_config(dataset=str(tmp_path / "a.txt"), val_size=0), tokenizer)
    rows = data.train.rows
    assert {len(ids) for ids in rows["input_ids"][:-1]} == {512}
    assert tokenizer.decode([token for ids in rows["input_ids"] for token in ids]) == text + "<|endoftext|>"


def test_texts_tokenised_in_several_calls_are_the_same(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = completions(*[(f"prompt {i} ", "response " * (i % 7)) for i in range(40)])
    whole = load(tmp_path, rows, tokenizer)
    monkeypatch.setattr("fullft.data.tokenise._CHARACTERS_PER_CALL", 100)
    calls = count_calls(tokenizer, monkeypatch)
    apart = load(tmp_path, rows, tokenizer, max_length=511)  # another option, so that the cache does not answer
    assert len(calls) > 10
    assert pairs(apart) == pairs(whole)


# ---------------------------------------------------------------------------------------------- errors with places


@pytest.mark.parametrize("split", ["train", "train[2:]", "train[4:]+train[3:4]"])
def test_a_value_of_wrong_type_names_its_line(split: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows: list[Row] = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(6)]
    rows[3]["output"] = 5
    with pytest.raises(DataError) as caught:
        load(tmp_path, rows, tokenizer, dataset_split=split)
    assert str(caught.value) == f"{tmp_path / 'rows.jsonl'}, line 4: output is int, expected text"


def test_a_null_in_renamed_columns_names_its_line(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"q": "x", "a": "y"}, {"q": "z", "a": None}]
    with pytest.raises(DataError, match=r"rows.jsonl, line 2: output is missing"):
        load(tmp_path, rows, tokenizer, columns={"instruction": "q", "output": "a"})


def test_bytes_that_are_no_text_name_their_line(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"text": "e"}\n{"text": "é"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.jsonl, line 2: not UTF-8 text"):
        load_data(make_config(dataset=str(path), val_size=0), tokenizer)


# ---------------------------------------------------------------------------------------------- the cache


def test_rows_are_tokenised_again_when_their_tokens_change(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", numbered(20))
    calls = count_calls(tokenizer, monkeypatch)

    def tokenises(changed: PreTrainedTokenizerBase = tokenizer, **options: Any) -> bool:
        calls.clear()
        load_data(make_config(**{"dataset": str(path), **options}), changed)
        return bool(calls)

    assert tokenises()
    assert not tokenises()
    # What decides the batches alone does not count.
    assert not tokenises(seed=7, val_size=0.5, packing=True, per_device_train_batch_size=4)
    assert tokenises(max_length=64)
    assert tokenises(train_on_prompt=True)
    assert tokenises(dataset_text_field="completion")
    assert tokenises(columns={"prompt": "completion", "completion": "prompt"})
    assert tokenises(adding(tokenizer, "<|im_start|> $A"))
    for name, value in (("eos_token", "<|im_end|>"), ("chat_template", "{{ messages }}")):
        changed = copy.deepcopy(tokenizer)
        setattr(changed, name, value)
        assert tokenises(changed), name
    assert not tokenises(copy.deepcopy(tokenizer))
    before = path.stat().st_mtime
    write_rows(path, numbered(21))
    os.utime(path, (before + 1, before + 1))
    assert tokenises()
    assert not tokenises()


def test_white_space_behind_an_eos_is_no_row_end(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for end in ("", "\n", " \n\n"):
        text = load(tmp_path, [{"text": f"one two<|endoftext|>{end}"}], tokenizer)
        assert pairs(text) == pairs(load(tmp_path, [{"text": "one two"}], tokenizer))
        exchange = load(tmp_path, completions(("one", f" two<|endoftext|>{end}")), tokenizer)
        assert pairs(exchange) == pairs(load(tmp_path, completions(("one", " two")), tokenizer))
    assert pairs(load(tmp_path, [{"text": "one two\n"}], tokenizer)) != pairs(text)


def test_nothing_is_written_beside_a_saved_data_set(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    Dataset.from_list(numbered(3)).save_to_disk(str(tmp_path / "set"))
    before = sorted((tmp_path / "set").iterdir())
    data = load_data(make_config(dataset=str(tmp_path / "set"), val_size=0), tokenizer)
    assert pairs(data) == pairs(load(tmp_path, numbered(3), tokenizer))
    assert sorted((tmp_path / "set").iterdir()) == before
