"""What a micro-batch says of its documents is found wherever its positions go, and transformers does not ask."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from models import VOCABULARY, make_config, tiny_model
from torch._dynamo.utils import counters
from transformers import PreTrainedModel, masking_utils

from fullft.attention import packed
from fullft.attention import positions as of_positions
from fullft.attention.choice import attend_packed
from fullft.attention.positions import documents_of, knowing_documents
from fullft.data.micro_batch import Documents, MicroBatch
from fullft.model.loss import LossSum
from fullft.transforms.activation_checkpointing import apply_activation_checkpointing
from fullft.transforms.compilation import apply_compilation

CPU = torch.device("cpu")
LENGTHS = [[20, 28], [48], [7, 30, 11]]


def micro_batch(*rows: list[int], is_told: bool = True) -> MicroBatch:
    torch.manual_seed(len(rows))
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])
    batch = MicroBatch.of(torch.randint(1, VOCABULARY, positions.shape))
    documents = Documents.of(sum(rows, [])) if is_told else None
    return replace(batch, inputs=batch.inputs | {"position_ids": positions}, documents=documents)


def packed_llama(**options: Any) -> PreTrainedModel:
    model = tiny_model("llama", torch.float32)
    assert attend_packed(model, "cuda")
    apply_activation_checkpointing(model, make_config(packing=True, **options))
    apply_compilation(model, make_config(packing=True, **options))
    return model


def gradients(model: PreTrainedModel, batch: MicroBatch) -> list[torch.Tensor]:
    LossSum(model)(batch).backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return found


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often documents were read from positions: each time costs a wait on a device."""
    count, nonzero = [0], torch.nonzero

    def counted(*arguments: Any) -> torch.Tensor:
        count[0] += 1
        return nonzero(*arguments)

    monkeypatch.setattr(of_positions.torch, "nonzero", counted)
    return count


def test_documents_are_known_as_long_as_positions(read: list[int]) -> None:
    """Not of a copy of them, of a part, or of others in their place."""
    batch = micro_batch(*LENGTHS)
    positions = batch.inputs["position_ids"]
    with knowing_documents(batch):
        pass
    assert documents_of(positions, 3, 48, CPU) is documents_of(positions.view(-1).view(3, 48), 3, 48, CPU)
    assert read[0] == 0
    assert documents_of(positions.clone(), 3, 48, CPU).lengths == batch.documents.lengths
    assert documents_of(positions[:1], 1, 48, CPU).lengths == (20, 28)
    assert documents_of(positions[1:2], 2, 48, CPU).lengths == (48, 48)
    assert read[0] == 3
    entries = len(of_positions._known)
    del positions, batch
    assert len(of_positions._known) == entries - 1


@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing": "none"},
        {"activation_checkpointing": "selective"},
        {"activation_checkpointing": "full"},
        {"compile": "true", "activation_checkpointing": "full"},
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_nothing_is_read_from_known_positions(options: dict[str, str], read: list[int]) -> None:
    """In forward, backward and recomputation, in one graph for any documents. Two are under way at a time.

    The negative control are micro-batches that do not say where their documents are.
    """
    torch._dynamo.reset()
    counters.clear()
    model = packed_llama(**options)
    known = [gradients(model, micro_batch(row)) for row in LENGTHS]
    both = LossSum(model)(micro_batch(LENGTHS[0])), LossSum(model)(micro_batch(LENGTHS[1]))
    both[0].backward()
    assert all(map(torch.equal, [parameter.grad for parameter in model.parameters()], known[0]))
    model.zero_grad()
    assert read[0] == 0
    assert counters["stats"]["unique_graphs"] == ("compile" in options)
    untold = [gradients(model, micro_batch(row, is_told=False)) for row in LENGTHS]
    assert read[0] >= 3 * 2 * 2  # batches, layers, forward and backward
    assert all(all(map(torch.equal, *each)) for each in zip(known, untold, strict=True))
    torch._dynamo.reset()


def test_wrong_documents_change_gradients() -> None:
    """What is said is what is used."""
    model = packed_llama(activation_checkpointing="none")
    right = gradients(model, micro_batch(LENGTHS[0]))
    wrong = gradients(model, replace(micro_batch(LENGTHS[0]), documents=Documents.of([21, 27])))
    assert max(float((one - other).norm() / one.norm()) for one, other in zip(right, wrong, strict=True)) > 1e-3


@pytest.mark.parametrize("packing", [False, True])
def test_transformers_is_not_asked_by_known_rows(packing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control is a micro-batch whose positions alone say where documents are."""
    asked = []

    def ask(positions: torch.Tensor) -> None:
        asked.append(positions)

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", ask)
    model = tiny_model("llama", torch.float32)
    rows = micro_batch(*LENGTHS) if packing else MicroBatch.of(torch.ones(2, 8, dtype=torch.int64))
    LossSum(model)(rows)
    assert not asked
    assert masking_utils.find_packed_sequence_indices is ask
    LossSum(model)(micro_batch(*LENGTHS, is_told=False))
    assert asked


def test_documents_are_numbered_as_by_transformers() -> None:
    positions = micro_batch(*LENGTHS).inputs["position_ids"]
    expected = masking_utils.find_packed_sequence_indices(positions)
    assert expected is not None
    assert torch.equal(of_positions._number_documents(positions), expected)


def test_models_with_masks_get_the_same_ones() -> None:
    """A model that keeps its own attention has the same loss, whether it asks or not."""
    model = tiny_model("mistral")
    told, untold = (LossSum(model)(micro_batch(*LENGTHS, is_told=told)).item() for told in (True, False))
    assert told == untold
    assert packed.NAME not in model.config._attn_implementation
