"""Faults in the order of copies and computing, put in one at a time: the race detector finds each of them."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from emulated_cuda import library
from emulated_cuda.runs import save_models, train_here
from fullft.errors import NonFiniteError
from fullft.optim import gradients
from fullft.storage import tiers
from fullft.storage.stream import ChunkStream, Field
from fullft.storage.workers import Workers, moved
from fullft.transforms import streaming

pytestmark = pytest.mark.emulated


def layers_do_not_wait_for_the_computation(patch: pytest.MonkeyPatch) -> None:
    """A layer's memory is overwritten while the layer before may still compute with it."""
    patch.setattr(streaming, "mark_computed", lambda device: None)


def stores_do_not_wait_for_the_computation(patch: pytest.MonkeyPatch) -> None:
    """A chunk is stored while it may still be updated."""
    take_back = ChunkStream._take_back

    def take_back_at_once(self: Any, visit: Any, slot: Any, computed: Any) -> Any:
        return take_back(self, visit, slot, None)

    patch.setattr(ChunkStream, "_take_back", take_back_at_once)


def the_computation_does_not_wait_for_copies(patch: pytest.MonkeyPatch) -> None:
    """What is being copied is used at once."""
    patch.setattr(Workers, "compute_after", lambda *_: None)


def new_slots_are_free_at_once(patch: pytest.MonkeyPatch) -> None:
    """A new slot's memory may still be used by the computation that had it before."""
    make_slot = ChunkStream._make_slot

    def make(self: Any, *arguments: Any, **named: Any) -> Any:
        slot = make_slot(self, *arguments, **named)
        slot.stored = moved(None)
        return slot

    patch.setattr(ChunkStream, "_make_slot", make)


def gradients_leave_before_they_are_computed(patch: pytest.MonkeyPatch) -> None:
    """A gradient is copied to the host while backward may still write it."""
    patch.setattr(gradients, "mark_computed", lambda device: None)


def gradients_are_added_before_they_arrive(patch: pytest.MonkeyPatch) -> None:
    """The host reads what is still being copied to it."""
    patch.setattr(gradients, "wait_for", lambda event: None)


def slots_are_filled_before_they_are_stored(patch: pytest.MonkeyPatch) -> None:
    """A chunk arrives where the one before is still being stored from."""
    take_back = ChunkStream._take_back

    def take_back_later(self: Any, visit: Any, slot: Any, computed: Any) -> Any:
        take_back(self, visit, slot, computed)
        return computed

    patch.setattr(ChunkStream, "_take_back", take_back_later)


FAULTS: list[Callable[[pytest.MonkeyPatch], None]] = [
    layers_do_not_wait_for_the_computation,
    stores_do_not_wait_for_the_computation,
    the_computation_does_not_wait_for_copies,
    new_slots_are_free_at_once,
    gradients_leave_before_they_are_computed,
    gradients_are_added_before_they_arrive,
    slots_are_filled_before_they_are_stored,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_fault_is_found(
    fault: Callable[[pytest.MonkeyPatch], None],
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    small_chunks: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_models(tmp_path, ["llama"], tokenizer)
    everything = "optimizer=host,gradients=host,parameters=host"
    options = {"model": tmp_path / "llama", "offload": everything, "output_dir": tmp_path / "run"}
    with monkeypatch.context() as patch:
        fault(patch)
        with suppress(NonFiniteError):  # some faults show in the numbers, too
            train_here(options)
    assert library.races
    library.reset()


@pytest.mark.parametrize("is_awaited", [True, False])
def test_host_reads_what_was_stored(is_awaited: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = tiers.Storage(torch.device("cuda"), tmp_path)
    array = storage.zeros("host", 5000, torch.float32)
    jobs = [{"values": Field(array, start, 1000, is_written=True)} for start in range(0, 5000, 1000)]
    library.reset()
    for views in ChunkStream(storage).run(jobs):
        views["values"].add_(1)
    assert library.figure("waits") == 0
    if not is_awaited:
        monkeypatch.setattr(tiers, "wait_for_all", lambda device: None)
    (piece,) = tiers.host_pieces(array)
    assert piece.sum() == 5000
    assert bool(library.races) is not is_awaited
    library.reset()
