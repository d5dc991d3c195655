"""Tokenising with tokenizers of other families: targets against the spans of all tokens."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rows import (
    IGNORED,
    completions,
    load,
    pairs,
    without_first,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

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


# ---------------------------------------------------------------------------------------------- other tokenizers


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
def test_targets_agree_with_the_spans_of_all_tokens(
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
        # A turn that says nothing would teach to stop at once.
        targets += [(start, len(text))] if role == "assistant" and content.strip() else []
    assert pairs(load(tmp_path, rows, changed)) == [by_all_spans(text, targets, changed, add_special_tokens=False)]
