"""Data: token ids and labels against plain tokenizer calls, the held-out split, the order, packing and the cache."""

import copy
import json
import math
import os
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from models import make_config
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fullft.data import Batches, Data, load_data
from fullft.errors import DataError
from fullft.micro_batch import MicroBatch

IGNORED = -100
EOS = 0  # <|endoftext|> of the demo's tokenizer; bos and pad, too
Row = dict[str, Any]


def write_rows(path: Path, rows: list[Row]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def load(tmp_path: Path, rows: list[Row], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Data:
    path = write_rows(tmp_path / "rows.jsonl", rows)
    return load_data(make_config(**{"dataset": str(path), "val_size": 0, **options}), tokenizer)


def pairs(data: Data) -> list[tuple[list[int], list[int]]]:
    """Give the token ids and labels of all training rows."""
    return [(row["input_ids"], row["labels"]) for row in data.train.rows]


def begins_by_bytes(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokenise text and find the character that each token begins in by counting its bytes, not by offsets."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    # A byte-level token is written with one character per byte.
    ends = accumulate(len(token) for token in tokenizer.convert_ids_to_tokens(ids))
    return ids, [len(text.encode()[:end].decode(errors="ignore")) for end in [0, *ends][:-1]]


def expected_pair(prompt: str, response: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    ids, begins = begins_by_bytes(prompt + response, tokenizer)
    labels = [token if begin >= len(prompt) else IGNORED for token, begin in zip(ids, begins, strict=True)]
    return [*ids, EOS], [*labels, EOS]


def without_first(labels: list[int]) -> list[int]:
    """Nothing predicts a sequence's first token."""
    return [IGNORED, *labels[1:]]


def adding(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    """Give a tokenizer that adds special tokens by itself."""
    changed = copy.deepcopy(tokenizer)
    tokens = [(token, changed.convert_tokens_to_ids(token)) for token in ("<|endoftext|>", "<|im_start|>")]
    changed.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=tokens)
    return changed


def completions(*texts: tuple[str, str]) -> list[Row]:
    return [{"prompt": prompt, "completion": completion} for prompt, completion in texts]


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
def test_ids_and_labels_are_those_of_prompt_and_response_tokenised_together(
    prompt: str, response: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = load(tmp_path, completions((prompt, response)), tokenizer)
    assert pairs(data) == [expected_pair(prompt, response, tokenizer)]


def test_an_alpaca_row_is_its_prompt_unlearned_and_its_output_learned(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = load(tmp_path, [{"instruction": "Add.", "input": "1, 2", "output": "3"}], tokenizer)
    prompt = "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n"
    assert pairs(data) == [expected_pair(prompt, "3", tokenizer)]


def test_a_token_that_begins_in_the_prompt_is_not_learned_even_if_it_ends_in_the_response(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
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


def test_eos_is_learned_where_pad_is_eos_and_padding_never_is(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
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


def test_a_bos_that_the_tokenizer_adds_stands_once_in_front_unlearned(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
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


def test_an_eos_that_the_tokenizer_adds_is_learned_and_not_doubled(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = completions(("the prompt ", "the response"))
    plain = pairs(load(tmp_path, rows, tokenizer))
    assert pairs(load(tmp_path, rows, adding(tokenizer, "$A <|endoftext|>"))) == plain
    assert plain[0][0].count(EOS) == plain[0][1].count(EOS) == 1


def test_an_eos_that_the_rows_hold_is_not_doubled(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    plain = pairs(load(tmp_path, completions(("the prompt ", "the response")), tokenizer))
    assert pairs(load(tmp_path, completions(("the prompt ", "the response<|endoftext|>")), tokenizer)) == plain


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


def test_no_eos_is_added_behind_a_turn_that_ends_with_it(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
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


# ---------------------------------------------------------------------------------------------- other tokenizers


NASTY = [
    ("Say: ", " two  spaces,\ttabs \n\n and an end "),
    ("naïve é", "\N{COMBINING ACUTE ACCENT} Ünïcode \N{GRINNING FACE}\N{GRINNING FACE}\N{ZERO WIDTH JOINER}x"),
    ("漢字 かな", "かな and 漢字"),
    ("  leading", "Split in a word"),
    ("<|endoftext|><s>[SEP] ", "a</s>b[SEP]<|im_start|>"),
    ("", "no prompt"),
    ("nothing to learn", ""),
    (
        "\N{LATIN SMALL LIGATURE FI}ne \N{FULLWIDTH LATIN CAPITAL LETTER A}",
        "\N{NO-BREAK SPACE}\x00\N{BYTE ORDER MARK}.",
    ),
]
TEMPLATE = (
    "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def trained(model: models.Model, trainer: trainers.Trainer, **parts: Any) -> Tokenizer:
    backend = Tokenizer(model)
    for name, part in parts.items():
        setattr(backend, name, part)
    backend.train_from_iterator(["Say two spaces in a word, and no prompt; nothing to learn. 漢字 かな"] * 3, trainer)
    return backend


def sentencepiece_like(_: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Spaces are pieces of words, one is put in front, what is unknown falls apart into bytes; as Llama's first."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    marks = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend = trained(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True), trainer, normalizer=marks)
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def bert_like(_: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Spaces are between tokens, accents and capitals are lost, and each text is wrapped in [CLS] and [SEP]."""
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    parts = {"normalizer": normalizers.BertNormalizer(), "pre_tokenizer": pre_tokenizers.BertPreTokenizer()}
    backend = trained(models.WordPiece(unk_token="[UNK]"), trainer, **parts)
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]", unk_token="[UNK]")


def roberta_like(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Byte-level, with spans that leave the space before a word out, and tokens added in front and behind."""
    changed = copy.deepcopy(tokenizer)
    changed.backend_tokenizer.post_processor = processors.RobertaProcessing(("<|endoftext|>", 0), ("<|im_start|>", 1))
    return changed


def by_all_spans(
    text: str, targets: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase, side: int = 0, **options: Any
) -> tuple[list[int], list[int]]:
    """Look at every token's span, as transformers gives it, and at whether the tokenizer added it."""
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, **options)
    learned = [
        not added and any(start <= span[side] < end for start, end in targets)
        for span, added in zip(encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
    ]
    ids, eos = encoded["input_ids"], tokenizer.eos_token_id
    if len(ids) > 1 and ids[-1] == eos:
        ids, learned = ids[:-1], learned[:-1]
    labels = [token if is_target else IGNORED for token, is_target in zip(ids, learned, strict=True)]
    return [*ids, eos], without_first([*labels, eos])


@pytest.mark.parametrize("make", [copy.deepcopy, roberta_like, sentencepiece_like, bert_like])
def test_targets_are_those_that_all_spans_of_a_row_would_tell(
    make: Callable[[PreTrainedTokenizerBase], PreTrainedTokenizerBase],
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    changed = make(tokenizer)
    changed.chat_template = TEMPLATE
    changed.backend_tokenizer.enable_truncation(2)  # what an earlier call left set must not cut our rows
    changed.backend_tokenizer.enable_padding(length=200)
    exchanges = [(prompt + answer, [(len(prompt), len(prompt + answer))]) for prompt, answer in NASTY if answer]
    assert pairs(load(tmp_path, completions(*NASTY), changed)) == [by_all_spans(*each, changed) for each in exchanges]
    assert [by_all_spans(*each, changed, side=1) for each in exchanges] != [
        by_all_spans(*each, changed) for each in exchanges
    ]
    # Several stretches, in texts that hold their special tokens themselves.
    turns = [turn for prompt, answer in NASTY for turn in (("user", prompt), ("assistant", answer))]
    rows = [{"messages": [{"role": role, "content": content} for role, content in turns]}]
    text, targets = "", []
    for role, content in turns:
        start = len(text) + len(f"<{role}>")
        text += f"<{role}>{content}\n"
        targets += [(start, len(text))] if role == "assistant" else []
    assert pairs(load(tmp_path, rows, changed)) == [by_all_spans(text, targets, changed, add_special_tokens=False)]


# ---------------------------------------------------------------------------------------------- lengths


def test_a_row_cut_at_max_length_has_no_eos(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt, response = "p ", "a b c d e f g h i j"
    ids, labels = expected_pair(prompt, response, tokenizer)
    data = load(tmp_path, completions((prompt, response)), tokenizer, max_length=8)
    assert pairs(data) == [(ids[:8], labels[:8])]
    assert "1 cut at 8" in data.description
    fitting = load(tmp_path, completions((prompt, response)), tokenizer, max_length=len(ids))
    assert pairs(fitting) == [(ids, labels)]
    assert f"0 cut at {len(ids)}" in fitting.description


def test_rows_with_nothing_to_learn_are_dropped_and_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = completions(("p ", "r"), ("p ", ""), ("a long prompt " * 5, "r"), ("p ", "s"))
    data = load(tmp_path, rows, tokenizer, max_length=16)
    assert [tokenizer.decode(ids) for ids, _ in pairs(data)] == ["p r<|endoftext|>", "p s<|endoftext|>"]
    assert "4 rows" in data.description and "2 dropped" in data.description and "0 cut" in data.description


def test_rows_of_which_none_has_anything_to_learn_are_an_error(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(DataError, match="none of the 2 rows has a token to learn"):
        load(tmp_path, completions(("p", ""), ("p", "")), tokenizer)


def test_a_thousand_empty_rows_in_front_do_no_harm(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    # The library infers column types from the first thousand rows, unless told.
    data = load(tmp_path, completions(*[("p ", "")] * 1000, ("p ", "r")), tokenizer)
    assert pairs(data) == [expected_pair("p ", "r", tokenizer)]


@pytest.mark.parametrize("max_length", [8, 16, 1000])
def test_text_is_split_into_consecutive_pieces_with_eos_behind_the_last(
    max_length: int, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    text = "The quick brown fox jumps over the lazy dog. \N{GRINNING FACE} " * 3
    ids = [*tokenizer(text).input_ids, EOS]
    assert len(ids) % max_length != 1
    pieces = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
    data = load(tmp_path, [{"text": text}], tokenizer, max_length=max_length)
    assert pairs(data) == [(piece, without_first(piece)) for piece in pieces]
    assert "0 dropped" in data.description and "0 cut" in data.description


def test_a_last_piece_of_eos_alone_is_left_out_for_nothing_predicts_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
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


def test_texts_tokenised_in_several_calls_equal_those_of_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = completions(*[(f"prompt {i} ", "response " * (i % 7)) for i in range(40)])
    whole = load(tmp_path, rows, tokenizer)
    monkeypatch.setattr("fullft.data._CHARACTERS_PER_CALL", 100)
    calls = count_calls(tokenizer, monkeypatch)
    apart = load(tmp_path, rows, tokenizer, max_length=511)  # another option, so that the cache does not answer
    assert len(calls) > 10
    assert pairs(apart) == pairs(whole)


# ---------------------------------------------------------------------------------------------- held-out rows


def numbered(count: int) -> list[Row]:
    return completions(*[("n ", str(i)) for i in range(count)])


def numbers(batches: Batches | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Give the rows' numbers, from their texts."""
    assert batches is not None
    return [int(tokenizer.decode(ids[:-1]).removeprefix("n ")) for ids in batches.rows["input_ids"]]


@pytest.mark.parametrize(("count", "val_size", "seed"), [(40, 0.05, 42), (41, 0.05, 7), (100, 0.07, 0), (10, 0.5, 1)])
def test_the_last_rows_of_the_seeded_shuffle_are_held_out(
    count: int, val_size: float, seed: int, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = load(tmp_path, numbered(count), tokenizer, val_size=val_size, seed=seed)
    shuffled = Dataset.from_dict({"number": list(range(count))}).shuffle(seed=seed)["number"][:]
    num_held_out = math.ceil(round(val_size * count, 6))
    assert set(numbers(data.evaluation, tokenizer)) == set(shuffled[-num_held_out:])
    assert numbers(data.train, tokenizer) == sorted(shuffled[:-num_held_out])
    assert f"{num_held_out} held out" in data.description


def test_a_dropped_row_does_not_move_the_split(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = numbered(40)
    before = set(numbers(load(tmp_path, rows, tokenizer, val_size=0.25).evaluation, tokenizer))
    dropped = next(i for i in range(40) if i not in before)
    rows[dropped]["completion"] = ""
    assert set(numbers(load(tmp_path, rows, tokenizer, val_size=0.25).evaluation, tokenizer)) == before


def test_all_pieces_of_a_text_are_on_one_side(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [" ".join([f"n{i}"] * 30) for i in range(10)]
    data = load(tmp_path, [{"text": text} for text in texts], tokenizer, val_size=0.3, max_length=16)
    assert data.evaluation is not None
    train, held_out = set(data.train.rows["row"]), set(data.evaluation.rows["row"])
    assert len(train) == 7 and len(held_out) == 3 and not train & held_out
    assert len(data.train.rows) > 14  # several pieces each


def test_a_single_document_holds_out_pieces(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    config = make_config(dataset=str(tmp_path / "a.txt"), val_size=0.1, max_length=16)
    data = load_data(config, tokenizer)
    assert data.evaluation is not None
    pieces = len(data.train.rows) + len(data.evaluation.rows)
    assert len(data.evaluation.rows) == math.ceil(0.1 * pieces) > 1


def test_holding_out_nothing_or_everything(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    assert load(tmp_path, numbered(3), tokenizer, val_size=0).evaluation is None
    with pytest.raises(DataError, match="--val_size 0 trains on all of them"):
        load(tmp_path, numbered(1), tokenizer, val_size=0.05)


# ---------------------------------------------------------------------------------------------- the order


def sequences_of(micro_batch: MicroBatch) -> list[list[int]]:
    """Give the token ids without padding: every row ends with the one EOS that is learned."""
    ends = [int((labels != IGNORED).nonzero().max()) + 1 for labels in micro_batch.labels]
    return [ids[:end].tolist() for ids, end in zip(micro_batch.inputs["input_ids"], ends, strict=True)]


def rows_of_step(batches: Batches, step: int) -> list[tuple[int, ...]]:
    return [tuple(ids) for micro_batch in batches.global_batch(step) for ids in sequences_of(micro_batch)]


def test_1000_rows_at_0_05_and_1_x_16_are_60_steps_an_epoch(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data = load(tmp_path, numbered(1000), tokenizer, val_size=0.05)
    assert data.train.steps_per_epoch == 60
    assert len(data.train.global_batch(1)) == 16
    # The last global batch is smaller, and belongs to the epoch.
    assert len(data.train.global_batch(60)) == 950 - 59 * 16 == 6
    assert len(data.train.global_batch(61)) == 16


@pytest.mark.parametrize(("batch", "accumulation"), [(1, 4), (3, 2), (8, 1)])
def test_every_row_comes_once_per_epoch_in_another_order_each(
    batch: int, accumulation: int, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = load(
        tmp_path,
        numbered(50),
        tokenizer,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    ).train
    everything = [tuple(ids) for ids in data.rows["input_ids"]]
    steps = data.steps_per_epoch
    assert steps == math.ceil(50 / (batch * accumulation))
    epochs = [
        [row for step in range(first, first + steps) for row in rows_of_step(data, step)] for first in (1, 1 + steps)
    ]
    for epoch in epochs:
        assert Counter(epoch) == Counter(everything)
    assert epochs[0] != epochs[1] and epochs[0] != everything


def test_how_rows_fall_into_micro_batches_does_not_change_a_step(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    shapes = [(1, 8), (2, 4), (8, 1)]
    loaded = [
        load(tmp_path, numbered(30), tokenizer, per_device_train_batch_size=batch, gradient_accumulation_steps=count)
        for batch, count in shapes
    ]
    for step in (1, 4, 5):
        steps = [rows_of_step(data.train, step) for data in loaded]
        assert steps[0] == steps[1] == steps[2]


def test_a_step_is_a_pure_function_of_seed_and_step(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    options = {"val_size": 0.2, "gradient_accumulation_steps": 4}
    first = load(tmp_path, numbered(50), tokenizer, **options).train
    forward = {step: rows_of_step(first, step) for step in range(1, 25)}
    torch.manual_seed(1)
    again = load(tmp_path, numbered(50), tokenizer, **options).train
    state = torch.get_rng_state()
    assert {step: rows_of_step(again, step) for step in reversed(range(1, 25))} == forward
    assert torch.equal(torch.get_rng_state(), state)  # dropout's stream is left alone
    orders = [load(tmp_path, numbered(50), tokenizer, seed=seed).train.global_batch(1) for seed in (42, 43)]
    assert not torch.equal(*(batches[0].inputs["input_ids"] for batches in orders))


def test_counts_exclude_padding(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = completions(*[("p ", "r " * count) for count in (1, 9, 4, 2, 7)])
    data = load(tmp_path, rows, tokenizer, per_device_train_batch_size=5, gradient_accumulation_steps=1)
    (micro_batch,) = data.train.global_batch(1)
    expected = [expected_pair(row["prompt"], row["completion"], tokenizer) for row in rows]
    assert micro_batch.num_tokens == sum(len(ids) for ids, _ in expected)
    assert micro_batch.num_tokens < micro_batch.inputs["input_ids"].numel()
    assert micro_batch.num_target_tokens == sum(len(labels) - labels.count(IGNORED) for _, labels in expected)
    assert micro_batch.num_target_tokens == (micro_batch.labels != IGNORED).sum()


def test_the_shift_by_one_loses_no_target(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for micro_batch in load(tmp_path, [{"text": "a b c d e f g h"}], tokenizer, max_length=4).train.by_length():
        assert (micro_batch.labels[:, 1:] != IGNORED).sum() == micro_batch.num_target_tokens


@pytest.mark.parametrize("options", [{}, {"per_device_train_batch_size": 3}, {"packing": True, "max_length": 32}])
def test_evaluation_sees_every_row_once_and_needs_no_more_tokens_than_the_largest_micro_batch(
    options: Row, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = completions(*[("p ", "r " * (1 + 7 * i % 19)) for i in range(40)])
    batches = load(tmp_path, rows, tokenizer, **options).train
    micro_batches, shape = list(batches.by_length()), batches.largest().labels.shape
    assert all(each.labels.numel() <= shape.numel() and each.labels.shape[1] <= shape[1] for each in micro_batches)
    assert batches.packing or len(micro_batches) < len(batches.documents) / batches.batch_size  # short ones together
    seen = [ids for each in micro_batches for ids in sequences_of(each)]
    whole = [sum((batches.rows[i]["input_ids"] for i in documents), []) for documents in batches.documents]
    assert sorted(seen) == sorted(whole) and [*map(len, seen)] == sorted(map(len, whole))


# ---------------------------------------------------------------------------------------------- packing


def test_packed_documents_are_whole_and_positions_restart_with_each(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = completions(*[("p ", "r " * (1 + i % 9)) for i in range(40)])
    options = {"max_length": 32, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 1}
    packed, plain = (load(tmp_path, rows, tokenizer, packing=packing, **options) for packing in (True, False))
    found, padding = [], 0
    for micro_batch in packed.train.by_length():
        ids, positions = micro_batch.inputs["input_ids"], micro_batch.inputs["position_ids"]
        assert ids.shape == positions.shape == micro_batch.labels.shape
        assert ids.shape[1] <= 32
        for sequence in range(len(ids)):
            starts = [*(positions[sequence] == 0).nonzero().flatten().tolist(), ids.shape[1]]
            for start, end in zip(starts, starts[1:], strict=False):
                assert positions[sequence, start:end].tolist() == list(range(end - start))
                labels = micro_batch.labels[sequence, start:end].tolist()
                if set(labels) == {IGNORED}:  # the padding at the end counts as one more document
                    assert end == ids.shape[1] and set(ids[sequence, start:end].tolist()) == {EOS}
                    padding += end - start
                else:
                    found.append((tuple(ids[sequence, start:end].tolist()), tuple(labels)))
        assert micro_batch.num_tokens <= ids.numel() and ids.shape[1] <= 32
    assert padding > 0  # else the case is not there
    assert Counter(found) == Counter((tuple(ids), tuple(labels)) for ids, labels in pairs(plain))
    assert len(packed.train.documents) < len(plain.train.documents) / 2


def test_a_packed_epoch_has_the_tokens_of_an_unpacked_one(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = completions(*[("p ", "r " * (1 + i % 9)) for i in range(40)])
    totals = []
    for packing in (True, False):
        data = load(tmp_path, rows, tokenizer, packing=packing, max_length=64, gradient_accumulation_steps=2).train
        batches = [batch for step in range(1, data.steps_per_epoch + 1) for batch in data.global_batch(step)]
        totals.append((sum(b.num_tokens for b in batches), sum(b.num_target_tokens for b in batches)))
        shapes = {tuple(b.labels.shape) for b in batches}
        assert (len(shapes) == 1) == packing  # so that one compiled graph serves them
    assert totals[0] == totals[1]


def test_unpacked_batches_have_no_position_ids(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (micro_batch,) = load(tmp_path, numbered(1), tokenizer).train.by_length()
    assert set(micro_batch.inputs) == {"input_ids"}


# ---------------------------------------------------------------------------------------------- errors with places


@pytest.mark.parametrize("split", ["train", "train[2:]", "train[4:]+train[3:4]"])
def test_a_value_of_the_wrong_type_is_named_with_file_and_line(
    split: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows: list[Row] = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(6)]
    rows[3]["output"] = 5
    with pytest.raises(DataError) as caught:
        load(tmp_path, rows, tokenizer, dataset_split=split)
    assert str(caught.value) == f"{tmp_path / 'rows.jsonl'}, line 4: output is int, expected text"


def test_a_null_is_named_with_file_and_line_under_renamed_columns(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"q": "x", "a": "y"}, {"q": "z", "a": None}]
    with pytest.raises(DataError, match=r"rows.jsonl, line 2: output is missing"):
        load(tmp_path, rows, tokenizer, columns={"instruction": "q", "output": "a"})


def test_bytes_that_are_no_text_are_named_with_file_and_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"text": "e"}\n{"text": "é"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.jsonl, line 2: not UTF-8 text"):
        load_data(make_config(dataset=str(path), val_size=0), tokenizer)


def test_unknown_columns_are_an_error_that_lists_them(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="has the columns answer, question, which fit no known format"):
        load(tmp_path, [{"question": "q", "answer": "a"}], tokenizer)


def test_a_text_field_beats_the_other_formats(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"instruction": "q", "output": "a", "body": "some text"}]
    ((ids, _),) = pairs(load(tmp_path, rows, tokenizer, dataset_text_field="body"))
    assert tokenizer.decode(ids) == "some text<|endoftext|>"


# ---------------------------------------------------------------------------------------------- the cache


def count_calls(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect the number of texts of every call of the tokenizer."""
    calls: list[int] = []
    call = type(tokenizer).__call__

    def counted(self: PreTrainedTokenizerBase, text: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(text))
        return call(self, text, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    return calls


def test_rows_are_tokenised_once_and_again_when_what_decides_their_tokens_changes(
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


def test_the_fingerprint_is_that_of_the_tokens_not_of_the_file(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    def fingerprint(name: str, rows: list[Row], **options: Any) -> str:
        (tmp_path / name).mkdir(exist_ok=True)
        return load(tmp_path / name, rows, tokenizer, **options).fingerprint

    rows = numbered(20)
    known = fingerprint("a", rows)
    assert fingerprint("b", rows) == known  # the same rows elsewhere
    assert fingerprint("a", rows, seed=7, packing=True) == known
    different = {
        fingerprint("c", rows[::-1]),
        fingerprint("d", rows[:-1]),
        fingerprint("a", rows, max_length=3),
        fingerprint("a", rows, train_on_prompt=True),
    }
    assert len(different | {known}) == 5


def test_the_description_counts_and_shows_what_is_learned(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data = load(tmp_path, completions(("the prompt ", "the response")), tokenizer)
    ids, labels = expected_pair("the prompt ", "the response", tokenizer)
    assert f"1 rows, {len(ids)} tokens, {1 - labels.count(IGNORED) / len(ids):.0%} trained" in data.description
    shown = data.description.splitlines()[-1]
    assert shown.endswith("<|endoftext|>]") and "the prompt" in shown.split("[")[-2]
    assert data.largest_token_id == max(ids)
    assert data.longest == len(ids)


def test_micro_batches_move_with_all_their_parts(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (micro_batch,) = load(tmp_path, numbered(1), tokenizer, packing=True).train.by_length()
    moved = micro_batch.to(torch.device("meta"))
    assert {tensor.device.type for tensor in (*moved.inputs.values(), moved.labels)} == {"meta"}
    assert (moved.num_tokens, moved.num_target_tokens) == (micro_batch.num_tokens, micro_batch.num_target_tokens)
    assert all(tensor.dtype == torch.int64 for tensor in (*micro_batch.inputs.values(), micro_batch.labels))
