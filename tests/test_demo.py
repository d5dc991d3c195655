"""The demo: rows and tokenizer are what their scripts make, and what it learns carries over to held-out rows."""

import json
from collections import Counter
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

import train
from fullft.config.options import DEMO_FOLDER
from fullft.config.parse import parse_config
from fullft.demo.make_rows import KINDS, as_jsonl, make_rows
from fullft.demo.make_tokenizer import read_corpus, render_row, train_tokenizer

ROWS = [json.loads(line) for line in (DEMO_FOLDER / "instructions.jsonl").read_text(encoding="utf-8").splitlines()]
KIND_OF = {instruction: kind for kind, (_, instructions) in enumerate(KINDS) for instruction in instructions}


def test_rows_are_what_the_script_makes() -> None:
    assert (DEMO_FOLDER / "instructions.jsonl").read_text(encoding="utf-8") == as_jsonl(make_rows())


def test_no_input_comes_twice_within_a_kind() -> None:
    assert Counter((KIND_OF[row["instruction"]], row["input"]) for row in ROWS).most_common(1)[0][1] == 1


def test_every_instruction_belongs_to_one_kind() -> None:
    assert len(KIND_OF) == sum(len(instructions) for _, instructions in KINDS)


def test_tokenizer_is_what_the_script_makes(tokenizer: PreTrainedTokenizerBase) -> None:
    assert train_tokenizer(read_corpus()).get_vocab() == tokenizer.get_vocab()


def test_every_word_of_an_input_is_one_token(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [render_row(row) for row in ROWS]
    assert tokenizer.batch_decode(tokenizer(texts).input_ids) == texts
    words = {f" {word}" for row in ROWS for word in row["input"].rstrip(".").split()[1:]}
    assert [word for word in words if len(tokenizer(word).input_ids) > 1] == []


def test_held_out_loss_halves_within_forty_steps(tmp_path: Path) -> None:
    options = "--max_steps 40 --gradient_accumulation_steps 1 --eval_steps 40 --save_strategy no --output_dir"
    train.main(parse_config([*options.split(), str(tmp_path / "run")]))
    results = json.loads((tmp_path / "run" / "train_results.json").read_text())
    assert results["eval_loss_after"] < results["eval_loss_before"] / 2


@pytest.mark.slow
def test_whole_demo_learns_what_was_held_out(tmp_path: Path) -> None:
    train.main(parse_config(["--output_dir", str(tmp_path / "run")]))
    results = json.loads((tmp_path / "run" / "train_results.json").read_text())
    assert results["eval_loss_after"] < results["eval_loss_before"] / 2
    held_out = [sample for sample in results["samples"] if sample["held_out"]]
    right_before, right_after = (
        [sample["prompt"] for sample in held_out if sample[when] == sample["expected"]] for when in ("before", "after")
    )
    assert len(held_out) == 3
    assert not right_before  # the negative control
    assert len(right_after) >= 2, held_out
