"""Layer streaming: a decoder layer's weights are on the device only while it computes; their home is elsewhere.

Owns the homes, and bringing layers from there, the next one ahead of time. The optimizer updates weights at home.
Backward recomputes a layer, and so asks for it again. It must be applied last: compiled layers come, too, before they
compute.
"""

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fullft.model.parts import decoder_layers
from fullft.storage.tiers import Array, DiskArray, Storage, Workers, aligned_bytes, fill, home_of, mark_computed, paged
from fullft.transforms.activation_checkpointing import recompute


def settle_layers(model: PreTrainedModel, tier: str, storage: Storage, with_values: bool = True) -> None:
    """Give the weights of the decoder layers a home, and leave shapes without bytes in their place.

    Args:
        model: on any device.
        tier: `host` or `disk`.
        storage: makes the homes, of each weight's own dtype.
        with_values: whether to move the weights there; else they are left to be filled.

    Raises:
        ModelError: the model's decoder layers cannot be found.
        DiskError: the disk has no room for them.
    """
    for parameter in decoder_layers(model).parameters():
        home = storage.zeros(tier, parameter.numel(), parameter.dtype)
        if with_values:
            fill(home, parameter.detach().cpu())
        parameter.home = home  # type: ignore[attr-defined]
        _leave(parameter, storage.device)


def _leave(parameter: nn.Parameter, device: torch.device) -> None:
    """Put a single number in the shape of the weight: everything that reads shapes goes on working."""
    parameter.data = torch.zeros(1, dtype=parameter.dtype, device=device).expand(parameter.shape)


def apply_layer_streaming(model: PreTrainedModel) -> None:
    """Have each decoder layer fetch its weights before it computes; a model that is all on its device stays as it is.

    Args:
        model: changed in place; `model.layer_stream` then holds the memory that layers take turns in.
    """
    if not any(home_of(parameter) is not parameter for parameter in model.parameters()):
        return
    layers = decoder_layers(model)
    stream = LayerStream(list(layers), next(iter(model.get_input_embeddings().parameters())).device)
    for number, layer in enumerate(layers):
        layer.forward = recompute(_streamed(layer.forward, stream, number))
    model.layer_stream = stream


def _streamed(forward: Callable[..., Any], stream: "LayerStream", number: int) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        stream.enter(number)
        return forward(*args, **kwargs)

    return wrapped


class LayerStream:
    """Memory for two layers: the one at work, and the next one on its way."""

    def __init__(self, layers: list[nn.Module], device: torch.device) -> None:
        """Take the memory.

        Args:
            layers: in the order of the forward pass, with homes.
            device: that computes.
        """
        self._layers = [list(layer.parameters()) for layer in layers]
        self._device, self._workers = device, Workers(device)
        size = max(sum(_num_bytes(parameter) for parameter in layer) for layer in self._layers)
        on_cpu = device.type == "cpu"
        # Only what comes from disk needs memory on the host on its way to an accelerator.
        is_on_disk = any(isinstance(home_of(parameter), DiskArray) for parameter in self._layers[0])
        self._hosts = [aligned_bytes(size if on_cpu or is_on_disk else 0, device) for _ in range(2)]
        self.memory = self._hosts
        if not on_cpu:
            self.memory = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._present: dict[int, int] = {}  # layer -> place in memory
        self._coming: dict[int, list[Future[None]]] = {}
        self._at_work: int | None = None

    def enter(self, number: int) -> None:
        """Have a layer's weights in place, and send for those of the layer that is probably next.

        The layer that was at work is done: in forward by order, and in backward because a layer's gradients are
        complete before its input's gradient reaches the layer below.

        Args:
            number: of the layer.
        """
        previous, self._at_work = self._at_work, number
        if number not in self._present:
            self._make_room(keep=number)
            self._send_for(number)
        for future in self._coming.pop(number, []):
            future.result()
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
        """Let all layers go: what is here is old as soon as the optimizer has changed what is at home."""
        self._at_work = None
        self._make_room(keep=None)

    def _make_room(self, keep: int | None) -> None:
        for number in [number for number in self._present if number != keep]:
            for future in self._coming.pop(number, []):
                future.result()
            del self._present[number]
            for parameter in self._layers[number]:
                _leave(parameter, self._device)

    def _send_for(self, number: int) -> None:
        slot = next(slot for slot in range(len(self.memory)) if slot not in self._present.values())
        self._present[number] = slot
        free = mark_computed(self._device)  # it may still be reading what this memory held before
        self._coming[number] = [
            self._workers.submit(self._bring, home_of(parameter), slot, place, size, free)
            for parameter, (size, place) in zip(self._layers[number], self._places(number), strict=True)
        ]

    def _places(self, number: int) -> Iterator[tuple[int, int]]:
        """Give the size and the place of each weight in a layer's memory, in bytes."""
        place = 0
        for parameter in self._layers[number]:
            yield _num_bytes(parameter), place
            place += _num_bytes(parameter)

    def _bring(self, home: Array, slot: int, place: int, size: int, free: torch.Event | None) -> None:
        host, memory = self._hosts[slot][place : place + size], self.memory[slot][place : place + size]
        count = home.numel() * home.element_size()
        if isinstance(home, DiskArray):
            home.read(0, home.numel(), host)
        with self._workers.copying("in", free):
            if not isinstance(home, DiskArray):
                memory[:count].view(home.dtype).copy_(home, non_blocking=True)
            elif self._device.type != "cpu":
                memory.copy_(host, non_blocking=True)


def _num_bytes(parameter: nn.Parameter) -> int:
    return paged(parameter.numel() * parameter.element_size())
