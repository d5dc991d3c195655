"""However a step is dealt into micro-batches, by tokens or by number, its gradients are the same."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from global_batches import UNEVEN, largest_difference, our_gradients, reference_gradients, tolerance
from models import SHAPE, make_config, tiny_model
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

from fullft.config.config import Config
from fullft.data.batches import Batches
from fullft.data.dealing import Dealing, deal, deal_evenly, find_dealings
from fullft.data.micro_batch import IGNORED

LENGTHS: list[int] = UNEVEN["num_tokens"][:]
WHOLE, LONGEST = sum(LENGTHS), max(LENGTHS)


def model_of(family: str) -> PreTrainedModel:
    if family != "mixtral":
        return tiny_model(family)
    torch.manual_seed(0)
    config = MixtralConfig(**SHAPE, num_local_experts=4, experts_implementation="eager")
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64).train()


@pytest.mark.parametrize("most_tokens", [LONGEST, 64, WHOLE // 2, WHOLE])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2", "gemma2", "mixtral"])
def test_gradients_are_those_of_rows_alone(family: str, most_tokens: int) -> None:
    model = model_of(family)
    loss, gradients = our_gradients(model, UNEVEN, micro_batch_tokens=most_tokens)
    expected_loss, expected = reference_gradients(model, UNEVEN)
    bound = tolerance(family) if family != "mixtral" else 1e-7  # its router computes in fp32
    assert loss == pytest.approx(expected_loss, rel=bound)
    assert largest_difference(gradients, expected) < 100 * bound


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("packing", [False, True])
def test_flat_rectangular_and_one_by_one_agree(family: str, packing: bool) -> None:
    model = model_of(family)
    _, alone = our_gradients(model, UNEVEN, packing=packing, per_device_train_batch_size=1)
    by_tokens = [{"micro_batch_tokens": 96}, {"micro_batch_tokens": WHOLE}]
    by_number = [{"per_device_train_batch_size": 4, "flat": flat} for flat in (False, True)]
    for options in (*by_tokens, *by_number):
        _, gradients = our_gradients(model, UNEVEN, packing=packing, **options)
        assert largest_difference(gradients, alone) < 1e-10


def test_rows_that_see_each_other_give_other_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the same rows behind each other, at positions that do not restart."""
    model = model_of("llama")
    _, expected = reference_gradients(model, UNEVEN)
    padded = Batches._padded

    def joined(self: Batches, *arguments: object) -> object:
        micro_batch = padded(self, *arguments)  # type: ignore[arg-type]
        micro_batch.inputs["position_ids"] = torch.arange(micro_batch.labels.shape[1])[None]
        return micro_batch

    monkeypatch.setattr(Batches, "_padded", joined)
    _, gradients = our_gradients(model, UNEVEN, micro_batch_tokens=WHOLE)
    assert largest_difference(gradients, expected) > 1e-3


# ---------------------------------------------------------------------------------------------- micro-batches


def by_tokens(most_tokens: int) -> Config:
    return make_config(max_length=64, micro_batch_tokens=most_tokens)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("most_tokens", [LONGEST, 64, 100, WHOLE])
def test_every_sequence_is_dealt_once(most_tokens: int, ranks: int) -> None:
    groups = deal(LENGTHS, most_tokens, ranks)
    assert sorted(index for group in groups for index in group) == list(range(16))
    assert all(group and sum(LENGTHS[index] for index in group) <= most_tokens for group in groups)
    assert len(groups) % ranks == 0 or len(groups) == 16
    evenly = deal_evenly(LENGTHS, 4)
    sizes = [sum(LENGTHS[index] for index in group) for group in evenly]
    assert max(sizes) - min(sizes) <= LONGEST and sum(sizes) == WHOLE


def test_micro_batches_have_no_padding_and_no_more_tokens_than_said() -> None:
    batches = Batches(UNEVEN, make_config(max_length=64, micro_batch_tokens=70), pad_token_id=0)
    batch = batches.global_batch(1)
    found = []
    for micro_batch in batch:
        ids, documents = micro_batch.inputs["input_ids"], micro_batch.documents
        assert ids.shape[0] == 1 and ids.shape[1] == micro_batch.num_tokens <= 70
        assert documents is not None and documents.num_tokens == ids.shape[1]
        positions = micro_batch.inputs["position_ids"][0]
        assert positions.tolist() == [place for length in documents.lengths for place in range(length)]
        assert int((micro_batch.labels[:, 1:] != IGNORED).sum()) == micro_batch.num_target_tokens
        found += [tuple(each.tolist()) for each in ids[0].split(list(documents.lengths))]
    assert sorted(found) == sorted(tuple(ids) for ids in UNEVEN["input_ids"])
    assert len(batch) < 16 and [micro_batch.is_last for micro_batch in batch].count(True) == 1


@pytest.mark.parametrize("most_tokens", [LONGEST, 64, WHOLE, 10 * WHOLE])
def test_no_micro_batch_is_larger_than_the_largest(most_tokens: int) -> None:
    batches = Batches(UNEVEN, make_config(max_length=64), pad_token_id=0).dealt(by_tokens(most_tokens))
    largest = batches.largest()
    assert largest.labels.shape == (1, min(most_tokens, WHOLE))
    assert largest.documents is not None and largest.documents.num_tokens == largest.labels.shape[1]
    for micro_batch in (*batches.global_batch(1), *batches.by_length()):
        assert micro_batch.labels.shape[1] <= largest.labels.shape[1]
        assert micro_batch.num_target_tokens <= largest.num_target_tokens
    assert sum(micro_batch.num_tokens for micro_batch in batches.by_length()) == WHOLE


def test_given_sizes_are_kept_and_have_no_padding_where_documents_are_told_apart() -> None:
    config = replace(make_config(max_length=64, per_device_train_batch_size=4), isolates_documents=True)
    padded, flat = (
        Batches(UNEVEN, each, pad_token_id=0) for each in (replace(config, isolates_documents=False), config)
    )
    for rectangle, row in zip(padded.global_batch(1), flat.global_batch(1), strict=True):
        assert len(rectangle.labels) == 4 and len(row.labels) == 1
        assert rectangle.num_tokens == row.num_tokens == row.labels.numel() < rectangle.labels.numel()
        assert rectangle.num_target_tokens == row.num_target_tokens
    largest, longest = flat.largest(), sorted(LENGTHS)[-4:]
    assert largest.labels.shape == (1, sum(longest)) and padded.largest().labels.shape == (4, LONGEST)
    assert all(micro_batch.labels.shape[1] <= sum(longest) for micro_batch in flat.by_length())
    assert sum(micro_batch.num_tokens for micro_batch in flat.by_length()) == WHOLE
    alone = Batches(UNEVEN, replace(config, per_device_train_batch_size=1), pad_token_id=0).global_batch(1)
    assert all("position_ids" not in micro_batch.inputs for micro_batch in alone)


def test_packed_sequences_are_not_padded_either() -> None:
    config = make_config(max_length=64, packing=True, per_device_train_batch_size=2, global_batch_size=4)
    one_row, two_rows = (
        Batches(UNEVEN, replace(config, isolates_documents=flat), pad_token_id=0).global_batch(1)
        for flat in (True, False)
    )
    assert [batch.labels.numel() for batch in one_row] == [batch.num_tokens for batch in one_row]
    assert [len(batch.labels) for batch in (*one_row, *two_rows)] == [1, 1, 2, 2]


@pytest.mark.parametrize("ranks", [1, 2])
def test_ways_to_deal_hold_for_every_step(ranks: int) -> None:
    random = np.random.default_rng(0)
    steps = [random.integers(2, 60, 16).tolist() for _ in range(50)] + [[5, 60, 7]]
    largest_step = max(map(sum, steps))
    ways = find_dealings(steps, ranks, longest=60, largest_step=largest_step)
    assert [way.tokens for way in ways] == sorted((way.tokens for way in ways), reverse=True)
    assert ways[0].micro_batches == 1 and ways[-1].tokens >= 60
    assert ranks > 1 or ways[0] == Dealing(largest_step, 1)
    for way in ways:
        counts = [-(-len(deal(step, way.tokens, ranks)) // ranks) for step in steps]
        assert max(counts) == way.micro_batches


def test_a_run_finds_its_largest_step_of_all_epochs() -> None:
    config = make_config(max_length=64, global_batch_size=3, num_train_epochs=4)
    batches = Batches(UNEVEN, config, pad_token_id=0)
    ways = batches.find_dealings(config)
    steps = [
        sum(micro_batch.num_tokens for micro_batch in batches.global_batch(step))
        for step in range(1, 4 * batches.steps_per_epoch + 1)
    ]
    assert ways[0] == Dealing(max(steps), 1)
    dealt = batches.dealt(by_tokens(ways[0].tokens))
    assert all(len(dealt.global_batch(step)) == 1 for step in range(1, len(steps) + 1))
    assert batches.dealt(by_tokens(ways[0].tokens - 1)).most_micro_batches(config) == 2
