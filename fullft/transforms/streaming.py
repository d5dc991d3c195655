"""Layer streaming: a decoder layer's weights are on the device only while it computes; their home is elsewhere.

How it works: a layer computes after its weights have come, and those of the next layer are sent for. On an accelerator
it is the computing stream that waits for them, and the host goes on. Backward recomputes each layer, and so asks for
its weights again. The optimizer updates weights at home. Under non-reentrant checkpointing no saved tensor refers to
weights between a layer's forward and its recomputation, so they may be dropped.

It must be applied last, so that compiled layers, too, have their weights before they compute.
"""

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fullft.model.parts import decoder_layers
from fullft.storage.disk import DiskArray, paged
from fullft.storage.tiers import Array, Storage, home_of, lives_elsewhere
from fullft.storage.workers import Moved, mark_computed, wait_for, wait_for_all
from fullft.tracing import device_type
from fullft.transforms.activation_checkpointing import recompute

_STREAMS: "weakref.WeakKeyDictionary[nn.Module, LayerStream]" = weakref.WeakKeyDictionary()


def apply_layer_streaming(model: PreTrainedModel, storage: Storage) -> None:
    """Make each decoder layer fetch its weights before it computes; a model that is all on its device is unchanged.

    Args:
        model: changed in place; `stream_of` then returns the memory that layers take turns in.
        storage: of the layers' homes.
    """
    if not any(map(lives_elsewhere, model.parameters())):
        return
    layers = decoder_layers(model)
    stream = _STREAMS[model] = LayerStream(list(layers), storage)
    for number, layer in enumerate(layers):
        layer.forward = recompute(_streamed(layer.forward, stream, number))


def stream_of(model: nn.Module) -> "LayerStream | None":
    """Return the stream of a model's layers, or None if they are all on the device."""
    return _STREAMS.get(model)


def _streamed(forward: Callable[..., Any], stream: "LayerStream", number: int) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        stream.enter(number)
        return forward(*args, **kwargs)

    return wrapped


class LayerStream:
    """Memory for two layers: the one at work, and the next one on its way.

    Args:
        layers: in the order of the forward pass, with homes.
        storage: of the homes.

    Attributes:
        memory: two blocks of bytes on the device.
    """

    def __init__(self, layers: list[nn.Module], storage: Storage) -> None:
        self._layers = [list(layer.parameters()) for layer in layers]
        self._device, self._workers = storage.device, storage.workers()
        device = storage.device
        size = max(sum(_num_bytes(parameter) for parameter in layer) for layer in self._layers)
        on_cpu = device_type(device) == "cpu"
        # Only what comes from disk needs memory on the host on its way to an accelerator.
        is_on_disk = any(isinstance(home_of(parameter), DiskArray) for parameter in self._layers[0])
        self._hosts = [storage.buffer(size if on_cpu or is_on_disk else 0) for _ in range(2)]
        self.memory = self._hosts
        if not on_cpu:
            self.memory = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        # A single number in the shape of each weight takes its place while it is away.
        self._absent = [[parameter.data for parameter in layer] for layer in self._layers]
        self._present: dict[int, int] = {}  # layer -> place in memory
        self._coming: dict[int, list[Moved]] = {}
        self._arrived: list[torch.Event | None] = [None, None]  # at each place, what came last: its host memory is free
        self._at_work: int | None = None
        # Nothing may still be copied when the memory is freed. At the end of the process it is not.
        weakref.finalize(self, wait_for_all, device).atexit = False

    def enter(self, number: int) -> None:
        """Put a layer's weights in place, and send for those of the layer that is probably next.

        The layer that was at work is done. In forward that follows from the order; in backward a layer's gradients are
        complete before its input's gradient reaches the layer below.

        Args:
            number: the layer's.
        """
        previous, self._at_work = self._at_work, number
        if number not in self._present:
            self._make_room(keep=number)
            self._send_for(number)
        self._wait_for_arrival(number)
        for parameter, (_, place) in zip(self._layers[number], self._places(number), strict=True):
            count = parameter.numel() * parameter.element_size()
            memory = self.memory[self._present[number]][place : place + count]
            parameter.data = memory.view(parameter.dtype).view(parameter.shape)
        # Forward goes up; backward turns around at the top, and goes down.
        is_last = number == len(self._layers) - 1
        goes_down = torch.is_grad_enabled() and (is_last or (previous is not None and 0 < number < previous))
        following = (number - 1 if goes_down else number + 1) % len(self._layers)
        if following not in self._present:
            self._make_room(keep=number)
            self._send_for(following)

    def release(self) -> None:
        """Drop all layers: their weights here are old once the optimizer has changed those at home."""
        self._at_work = None
        self._make_room(keep=None)

    def _make_room(self, keep: int | None) -> None:
        for number in [number for number in self._present if number != keep]:
            self._wait_for_arrival(number)  # of unused weights, too: their homes may be written next
            del self._present[number]
            for parameter, absent in zip(self._layers[number], self._absent[number], strict=True):
                parameter.data = absent

    def _wait_for_arrival(self, number: int) -> None:
        """Let what is computed from now on come after the arrival of a layer's weights."""
        if arrivals := self._coming.pop(number, []):
            for arrival in arrivals:
                self._workers.compute_after(arrival.result())
            self._arrived[self._present[number]] = mark_computed(self._device)

    def _send_for(self, number: int) -> None:
        slot = next(slot for slot in range(len(self.memory)) if slot not in self._present.values())
        self._present[number] = slot
        free = mark_computed(self._device)  # the computation may still read what this memory held before
        self._coming[number] = [
            self._workers.start(self._bring, home, slot, place, size, free, waits=isinstance(home, DiskArray))
            for home, (size, place) in zip(map(home_of, self._layers[number]), self._places(number), strict=True)
        ]

    def _places(self, number: int) -> Iterator[tuple[int, int]]:
        """Yield the size and the place of each weight in a layer's memory, in bytes."""
        place = 0
        for parameter in self._layers[number]:
            yield _num_bytes(parameter), place
            place += _num_bytes(parameter)

    def _bring(self, home: Array, slot: int, place: int, size: int, free: torch.Event | None) -> torch.Event | None:
        memory = self.memory[slot][place : place + size]
        if not isinstance(home, DiskArray):
            count = home.numel() * home.element_size()
            return self._workers.copy("in", [(memory[:count].view(home.dtype), home)], free)
        host = self._hosts[slot][place : place + size]
        wait_for(self._arrived[slot])
        home.read(0, home.numel(), host)
        return self._workers.copy("in", [] if self.memory is self._hosts else [(memory, host)], free)


def _num_bytes(parameter: nn.Parameter) -> int:
    return paged(parameter.numel() * parameter.element_size())
