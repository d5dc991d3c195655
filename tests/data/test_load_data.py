"""Loading data: the held-out split, the format, the fingerprint."""

import math
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from models import make_config
from rows import Row, completions, load, numbered, pairs, write_rows
from transformers import PreTrainedTokenizerBase

from fullft.data.batches import Batches
from fullft.data.load import load_data
from fullft.errors import DataError

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
