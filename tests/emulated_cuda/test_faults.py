"""Faults in the order of copies and computing, put in one at a time: the race detector finds each of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from emulated_cuda import library
from emulated_cuda.runs import save_models, train_here
from fullft.errors import NonFiniteError
from fullft.optim import gradients
from fullft.storage.stream import ChunkStream
from fullft.storage.workers import Workers
from fullft.transforms import streaming

pytestmark = pytest.mark.emulated


def layers_do_not_wait_for_the_computation(patch: pytest.MonkeyPatch) -> None:
    """A layer's memory is overwritten while the layer before may still compute with it."""
    patch.setattr(streaming, "mark_computed", lambda device: None)


def stores_do_not_wait_for_the_computation(patch: pytest.MonkeyPatch) -> None:
    """A chunk is stored while it may still be updated."""

    def store(self: Any, visit: Any) -> None:
        visit.slot.stored = self._workers.submit(self._take_back, visit, None)

    patch.setattr(ChunkStream, "_store", store)


def copies_are_not_waited_for(patch: pytest.MonkeyPatch) -> None:
    """What was copied is used at once."""

    @contextmanager
    def copying(self: Any, way: str, after: torch.Event | None = None) -> Iterator[None]:
        if after is not None:
            self._copies[way].wait_event(after)
        with self._copies[way]:
            yield

    patch.setattr(Workers, "copying", copying)


def new_slots_are_free_at_once(patch: pytest.MonkeyPatch) -> None:
    """A new slot's memory may still be used by the computation that had it before."""
    make_slot = ChunkStream._make_slot

    def make(self: Any, *arguments: Any, **named: Any) -> Any:
        slot = make_slot(self, *arguments, **named)
        slot.free = None
        return slot

    patch.setattr(ChunkStream, "_make_slot", make)


def gradients_leave_before_they_are_computed(patch: pytest.MonkeyPatch) -> None:
    """A gradient is copied to the host while backward may still write it."""
    add = gradients._add_to_sum

    def add_at_once(workers: Any, slot: Any, arrived: Any, computed: Any, *others: Any) -> None:
        add(workers, slot, arrived, None, *others)

    patch.setattr(gradients, "_add_to_sum", add_at_once)


def slots_are_filled_before_they_are_stored(patch: pytest.MonkeyPatch) -> None:
    """A chunk arrives where the one before is still being stored from."""
    bring = ChunkStream._bring

    def bring_at_once(self: Any, visit: Any) -> None:
        visit.slot.stored = None
        bring(self, visit)

    patch.setattr(ChunkStream, "_bring", bring_at_once)


FAULTS: list[Callable[[pytest.MonkeyPatch], None]] = [
    layers_do_not_wait_for_the_computation,
    stores_do_not_wait_for_the_computation,
    copies_are_not_waited_for,
    new_slots_are_free_at_once,
    gradients_leave_before_they_are_computed,
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
        with suppress(NonFiniteError):  # threads may spoil the numbers as well
            train_here(options)
        assert library.races
    library.reset()
