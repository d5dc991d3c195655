"""Micro-batches and global batches."""

from pathlib import Path

import torch
from rows import IGNORED, load, numbered
from transformers import PreTrainedTokenizerBase

from fullft.data.micro_batch import GlobalBatch, MicroBatch


def test_micro_batches_move_with_all_their_parts(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (micro_batch,) = load(tmp_path, numbered(1), tokenizer, packing=True).train.by_length()
    moved = micro_batch.to(torch.device("meta"))
    assert {tensor.device.type for tensor in (*moved.inputs.values(), moved.labels)} == {"meta"}
    assert (moved.num_tokens, moved.num_target_tokens) == (micro_batch.num_tokens, micro_batch.num_target_tokens)
    assert all(tensor.dtype == torch.int64 for tensor in (*micro_batch.inputs.values(), micro_batch.labels))


def test_random_numbers_follow_from_seed_step_and_place() -> None:
    """Whoever computes a micro-batch, and whatever was drawn before, dropout draws the same for it."""
    micro_batch = MicroBatch.of(torch.ones(1, 4, dtype=torch.int64))

    def draws(seed: int, step: int, *numbers: int) -> list[float]:
        torch.manual_seed(len(numbers))
        batch = GlobalBatch(seed, step, dict.fromkeys(numbers, micro_batch), 4, 3)
        return [torch.rand(()).item() for _ in batch]

    one, another, third = draws(5, 1, 0, 1, 2)
    assert len({one, another, third}) == 3
    assert draws(5, 1, 2, 1) == [third, another]
    assert not {*draws(5, 2, 0, 1, 2), *draws(6, 1, 0, 1, 2)} & {one, another, third}


def test_a_global_batch_counts_all_its_micro_batches() -> None:
    labels = torch.tensor([[5, IGNORED, 7], [8, 9, IGNORED]])
    parts = [MicroBatch.of(torch.ones(1, 4, dtype=torch.int64)), MicroBatch.of(torch.ones_like(labels), labels)]
    batch = GlobalBatch.of(parts)
    assert list(batch) == parts and len(batch) == 2
    assert batch.num_tokens == 4 + 6
    assert batch.num_target_tokens == 3 + 2  # nothing predicts a first token
