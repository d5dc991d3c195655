"""Loading data: the held-out split, the format, the fingerprint."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from command_lines import MODEL, problems_of
from datasets import Dataset
from models import make_config
from rows import Row, completions, expected_pair, load, numbered, pairs, without_first, write_rows
from small_runs import OUT, SMALL, steps_saved, train_small
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from fullft.config.parse import parse_config
from fullft.data.batches import Batches
from fullft.data.load import Data, load_data
from fullft.errors import CheckpointError, DataError
from fullft.memory.plan import Batch

# ---------------------------------------------------------------------------------------------- lengths


def test_a_dataset_without_any_target_is_an_error(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="none of the 2 rows has a token to learn"):
        load(tmp_path, completions(("p", ""), ("p", "")), tokenizer)


# ---------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize(("pad", "expected"), [(None, 0), (-1, 0), (1024, 0), (2**40, 0), (1023, 1023), (7, 7)])
def test_padding_has_an_embedding(
    pad: int | None, expected: int, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer's own id where the model has 1024 embeddings and it is one of them; else EOS, which is 0."""
    monkeypatch.setattr(type(tokenizer), "pad_token_id", pad, raising=False)
    rows = write_rows(tmp_path / "rows.jsonl", completions(("p", " a"), ("p", " much longer than the other one")))
    config = make_config(dataset=str(rows), val_size=0, per_device_train_batch_size=2, gradient_accumulation_steps=1)
    train = load_data(config, tokenizer, num_embeddings=1024).train
    (micro_batch,) = train.global_batch(1)
    padding = micro_batch.inputs["input_ids"][:, min(train.lengths) :].tolist()
    assert [expected] * (max(train.lengths) - min(train.lengths)) in padding


# ---------------------------------------------------------------------------------------------- held-out rows


def numbers(batches: Batches | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the rows' numbers, from their texts."""
    assert batches is not None
    return [int(tokenizer.decode(ids[:-1]).removeprefix("n ")) for ids in batches.rows["input_ids"]]


@pytest.mark.parametrize(("count", "val_size", "seed"), [(40, 0.05, 42), (41, 0.05, 7), (100, 0.07, 0), (10, 0.5, 1)])
def test_held_out_rows_end_the_seeded_shuffle(
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


def test_pieces_of_a_text_stay_on_one_side(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
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


def test_holding_out_every_row_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    assert load(tmp_path, numbered(3), tokenizer, val_size=0).evaluation is None
    with pytest.raises(DataError, match="--val_size 0 trains on all of them"):
        load(tmp_path, numbered(1), tokenizer, val_size=0.05)


# ---------------------------------------------------------------------------------------------- held-out rows, given

HELD_OUT = [("held ", "out"), ("a longer prompt that is held out ", "one two three four five six seven eight " * 3)]


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """A folder with 10 training and 2 validation rows, the second of which is the longest of all."""
    folder = tmp_path / "split"
    folder.mkdir()
    write_rows(folder / "train.jsonl", numbered(10))
    write_rows(folder / "validation.jsonl", completions(*HELD_OUT))
    return folder


@pytest.fixture(params=["file", "folder", "split"])
def given(request: pytest.FixtureRequest, split: Path) -> dict[str, Any]:
    """The options that give the same training and held-out rows in three ways."""
    if request.param == "split":
        return {"dataset": str(split), "eval_split": "validation"}
    held_out = split / "validation.jsonl"
    if request.param == "folder":
        folder = split.parent / "elsewhere"
        folder.mkdir()
        held_out.rename(folder / "rows.jsonl")
        return {"dataset": str(split), "eval_dataset": str(folder)}
    return {"dataset": str(split), "eval_dataset": str(held_out)}


def load_given(tokenizer: PreTrainedTokenizerBase, **options: Any) -> Data:
    return load_data(make_config(**options), tokenizer)


def held_out_pairs(data: Data) -> list[tuple[list[int], list[int]]]:
    assert data.evaluation is not None
    return [(row["input_ids"], row["labels"]) for row in data.evaluation.rows]


def expected_pairs(tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], list[int]]]:
    return [(ids, without_first(labels)) for ids, labels in (expected_pair(*each, tokenizer) for each in HELD_OUT)]


def test_given_rows_are_held_out_and_no_others(given: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    data = load_given(tokenizer, **given)
    assert numbers(data.train, tokenizer) == list(range(10))
    assert held_out_pairs(data) == expected_pairs(tokenizer)
    assert "10 rows, " in data.description and "; 2 held out" in data.description


def test_val_size_holds_out_more_rows(given: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    data = load_given(tokenizer, **given, val_size=0.2, seed=7)
    shuffled = Dataset.from_dict({"number": list(range(10))}).shuffle(seed=7)["number"][:]
    assert numbers(data.train, tokenizer) == sorted(shuffled[:-2])
    own = [expected_pair("n ", str(number), tokenizer) for number in sorted(shuffled[-2:])]
    assert held_out_pairs(data) == [*((ids, without_first(labels)) for ids, labels in own), *expected_pairs(tokenizer)]
    assert "; 4 held out" in data.description


def test_rows_on_both_sides_are_said(split: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    both = load_given(tokenizer, dataset=str(split), dataset_split="train+validation", eval_split="validation")
    assert "      held out: 2 rows of them may be trained on as well: the rows are the same\n" in both.description
    apart = load_given(tokenizer, dataset=str(split), eval_split="validation")
    assert "as well" not in apart.description


def test_held_out_rows_are_described(split: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (split / "notes.txt").write_text("")
    rows = completions(*HELD_OUT, ("nothing to learn", ""))
    write_rows(split / "validation.jsonl", [{**row, "source": "s"} for row in rows])
    description = load_given(tokenizer, dataset=str(split), eval_split="validation", max_length=16).description
    assert (
        f"      held out: {split}, split validation, 3 rows; 1 dropped (nothing to learn), 1 cut at 16\n" in description
    )
    assert "      held out: columns that nothing reads: source\n" in description
    assert description.count(f"files of the folder that are not read: {split / 'notes.txt'}\n") == 1


def test_plans_count_the_longest_held_out_row(given: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    longest = max(len(ids) for ids, _ in expected_pairs(tokenizer))
    data = load_given(tokenizer, **given)
    assert data.longest == longest > max(data.train.lengths)
    batch = Batch.of(*data.largest(2))
    assert (batch.length, batch.evaluation_length) == (max(data.train.lengths), longest)
    largest_id = max(max(ids) for ids, _ in expected_pairs(tokenizer))
    assert data.largest_token_id == max(largest_id, *(max(ids) for ids, _ in pairs(data)))


def test_the_fingerprint_is_of_held_out_rows_too(split: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    def fingerprint(**options: Any) -> str:
        return load_given(tokenizer, dataset=str(split), **options).fingerprint

    alone, both = fingerprint(), fingerprint(eval_split="validation")
    assert alone != both
    elsewhere = write_rows(split.parent / "same.jsonl", completions(*HELD_OUT))
    assert fingerprint(eval_dataset=str(elsewhere)) == both
    write_rows(elsewhere, completions(HELD_OUT[0]))
    assert fingerprint(eval_dataset=str(elsewhere)) not in (alone, both)


def test_a_broken_held_out_row_names_its_line(split: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_rows(split / "validation.jsonl", [*completions(HELD_OUT[0]), {"prompt": None, "completion": "x"}])
    with pytest.raises(DataError) as caught:
        load_given(tokenizer, dataset=str(split), eval_split="validation")
    assert str(caught.value) == f"{path}, line 2: prompt is missing, expected text"
    write_rows(path, completions(("nothing to learn", "")))
    with pytest.raises(DataError, match="none of the 1 rows has a token to learn"):
        load_given(tokenizer, dataset=str(split), eval_split="validation")


def test_val_size_is_zero_unless_given() -> None:
    def val_size(*words: str) -> float:
        return parse_config([*MODEL, "--preview=1", *words]).val_size

    assert val_size() == 0.05
    assert val_size("--eval_split=test") == val_size("--eval_dataset=x.jsonl") == 0
    assert val_size("--eval_split=test", "--val_size=0.1") == 0.1
    assert any("val_size" in line for line in problems_of(*MODEL, "--val_size=1"))


@pytest.mark.slow
def test_a_run_evaluates_what_it_was_given(
    split: Path, tmp_path: Path, model_folder: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"model": model_folder, "dataset": split, "eval_split": "validation", "precision": "fp32"}
    options |= {"max_steps": 3, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 1e-2}
    # SMALL sets val_size to 0, and this run leaves it to the options.
    monkeypatch.delitem(SMALL, "val_size")
    train_small(**options)
    log = [json.loads(line) for line in (OUT / "log.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["eval_loss"] for record in log if "eval_loss" in record}

    def reference(folder: Path) -> float:
        model, total, count = AutoModelForCausalLM.from_pretrained(folder).eval(), 0.0, 0
        for ids, labels in (expected_pair(*each, tokenizer) for each in HELD_OUT):
            ids, labels = ids[:64], labels[:64]
            logits = model(torch.tensor([ids])).logits[0, :-1]
            total += float(cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum").detach())
            count += sum(label != -100 for label in labels[1:])
        return total / count

    assert losses[0] == pytest.approx(reference(model_folder), rel=1e-5)
    assert losses[3] == pytest.approx(reference(OUT), rel=1e-5)
    assert losses[3] != pytest.approx(losses[0], rel=1e-4)

    # Resumed at step 2, it evaluates the same rows, and ends the same.
    assert steps_saved()[-1] == 2
    weights = (OUT / "model.safetensors").read_bytes()
    train_small(**options | {"output_dir": "again"}, resume_from_checkpoint=OUT / "checkpoint-2")
    assert (Path("again") / "model.safetensors").read_bytes() == weights
    again = [json.loads(line) for line in (Path("again") / "log.jsonl").read_text().splitlines()]
    assert [record["eval_loss"] for record in again if "eval_loss" in record] == [losses[3]]

    write_rows(split / "validation.jsonl", completions(*HELD_OUT[::-1]))
    with pytest.raises(CheckpointError):
        train_small(**options | {"output_dir": "other"}, resume_from_checkpoint=OUT / "checkpoint-2")


# ---------------------------------------------------------------------------------------------- errors with places


def test_unknown_columns_are_an_error_that_lists_them(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="has the columns answer, question, which fit no known format"):
        load(tmp_path, [{"question": "q", "answer": "a"}], tokenizer)


def test_a_text_field_beats_the_other_formats(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"instruction": "q", "output": "a", "body": "some text"}]
    ((ids, _),) = pairs(load(tmp_path, rows, tokenizer, dataset_text_field="body"))
    assert tokenizer.decode(ids) == "some text<|endoftext|>"


# ---------------------------------------------------------------------------------------------- the cache


def test_the_fingerprint_is_of_tokens_not_the_file(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
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
