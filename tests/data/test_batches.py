"""Batches: the order of the rows, what a step consists of, evaluation, packed sequences."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from rows import EOS, IGNORED, Row, completions, expected_pair, load, numbered, pairs
from transformers import PreTrainedTokenizerBase

from fullft.data.batches import Batches
from fullft.data.micro_batch import MicroBatch

# ---------------------------------------------------------------------------------------------- the order


def sequences_of(micro_batch: MicroBatch) -> list[list[int]]:
    """Return the token ids without padding: every row ends with the one EOS that is learned."""
    ends = [int((labels != IGNORED).nonzero().max()) + 1 for labels in micro_batch.labels]
    return [ids[:end].tolist() for ids, end in zip(micro_batch.inputs["input_ids"], ends, strict=True)]


def rows_of_step(batches: Batches, step: int) -> list[tuple[int, ...]]:
    return [tuple(ids) for micro_batch in batches.global_batch(step) for ids in sequences_of(micro_batch)]


def test_an_epoch_of_950_rows_has_60_steps(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data = load(tmp_path, numbered(1000), tokenizer, val_size=0.05)
    assert data.train.steps_per_epoch == 60
    assert len(data.train.global_batch(1)) == 16
    # The last global batch is smaller, and belongs to the epoch.
    assert len(data.train.global_batch(60)) == 950 - 59 * 16 == 6
    assert len(data.train.global_batch(61)) == 16


@pytest.mark.parametrize(("batch", "accumulation"), [(1, 4), (3, 2), (8, 1)])
def test_each_epoch_has_every_row_in_another_order(
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


def test_the_micro_batch_size_changes_no_step(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    shapes = [(1, 8), (2, 4), (8, 1)]
    loaded = [
        load(tmp_path, numbered(30), tokenizer, per_device_train_batch_size=batch, gradient_accumulation_steps=count)
        for batch, count in shapes
    ]
    for step in (1, 4, 5):
        steps = [rows_of_step(data.train, step) for data in loaded]
        assert steps[0] == steps[1] == steps[2]


def test_a_step_depends_on_seed_and_number_alone(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    options = {"val_size": 0.2, "gradient_accumulation_steps": 4}
    first = load(tmp_path, numbered(50), tokenizer, **options).train
    forward = {step: rows_of_step(first, step) for step in range(1, 25)}
    torch.manual_seed(1)
    again = load(tmp_path, numbered(50), tokenizer, **options).train
    assert {step: rows_of_step(again, step) for step in reversed(range(1, 25))} == forward
    orders = [load(tmp_path, numbered(50), tokenizer, seed=seed).train.global_batch(1) for seed in (42, 43)]
    assert not torch.equal(*(batch.micro_batches[0].inputs["input_ids"] for batch in orders))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_share_the_same_global_batch(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, ranks: int, packing: bool
) -> None:
    """Each micro-batch has one rank; who has fewer gets some of the same shape that teach nothing."""
    options = {"per_device_train_batch_size": 2, "global_batch_size": 10, "packing": packing, "max_length": 40}
    whole = load(tmp_path, numbered(47), tokenizer, **options).train
    loaded = [whole]
    if ranks > 1:
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        loaded = []
        for rank in range(ranks):
            monkeypatch.setenv("RANK", str(rank))
            loaded.append(load(tmp_path, numbered(47), tokenizer, **options).train)
    for step in range(1, 8):
        expected, batches = whole.global_batch(step), [each.global_batch(step) for each in loaded]
        assert {len(batch) for batch in batches} == {-(-len(expected) // ranks)}
        assert {(batch.num_tokens, batch.num_target_tokens) for batch in batches} == {
            (expected.num_tokens, expected.num_target_tokens)
        }
        found = {number: each for batch in batches for number, each in batch.micro_batches.items()}
        assert len(found) == ranks * len(batches[0])
        for number, each in found.items():
            if number < len(expected):
                assert torch.equal(each.inputs["input_ids"], expected.micro_batches[number].inputs["input_ids"])
                assert torch.equal(each.labels, expected.micro_batches[number].labels)
            else:
                assert (each.num_tokens, each.num_target_tokens) == (0, 0) and (each.labels == IGNORED).all()
        for batch in batches:
            assert [each.is_last for each in batch] == [False] * (len(batch) - 1) + [True]
    held_out = [list(each.by_length()) for each in loaded]
    assert len({len(each) for each in held_out}) == 1
    targets = sum(micro_batch.num_target_tokens for each in held_out for micro_batch in each)
    assert targets == sum(micro_batch.num_target_tokens for micro_batch in whole.by_length())


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
def test_evaluation_sees_every_row_in_bounded_batches(
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


def test_packed_documents_are_whole_and_restart_their_positions(
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
        documents = micro_batch.documents
        assert documents.bounds.tolist() == [*(positions.flatten() == 0).nonzero().flatten().tolist(), ids.numel()]
        assert documents.lengths == tuple(documents.bounds.diff().tolist())
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


def test_packing_keeps_the_tokens_of_an_epoch(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = completions(*[("p ", "r " * (1 + i % 9)) for i in range(40)])
    totals = []
    for packing in (True, False):
        data = load(tmp_path, rows, tokenizer, packing=packing, max_length=64, gradient_accumulation_steps=2).train
        batches = [batch for step in range(1, data.steps_per_epoch + 1) for batch in data.global_batch(step)]
        totals.append((sum(b.num_tokens for b in batches), sum(b.num_target_tokens for b in batches)))
    assert totals[0] == totals[1]


def test_unpacked_batches_have_no_position_ids(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (micro_batch,) = load(tmp_path, numbered(1), tokenizer).train.by_length()
    assert set(micro_batch.inputs) == {"input_ids"}
