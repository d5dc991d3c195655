"""Probing: what a loaded model makes of a few tokens, as a whole and layer by layer.

Logits of unlikely tokens are no measure in bf16: for token ids 1 to 32 those of SmolLM2 are off by 44% of the largest,
by rounding alone. Layer by layer, on the same inputs, rounding is 1.2% of what a layer adds, and documents that see
each other make 48%.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fullft.errors import ModelError
from fullft.model.parts import decoder_layers
from fullft.transforms.sharding import sharding_of

# Token ids that every vocabulary has, and the positions of two packed documents of as many tokens.
DOCUMENT = list(range(1, 33))
TWO_DOCUMENTS = list(range(len(DOCUMENT))) * 2


@contextmanager
def probing(model: PreTrainedModel) -> Iterator[None]:
    """Switch dropout and gradients off for some probes, and let a sharded model be called by itself.

    Args:
        model: its training mode is restored.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), sharding_of(model).gathered():
            yield
    finally:
        model.train(training)


def probe_inputs(model: PreTrainedModel, token_ids: list[int], positions: list[int] | None) -> dict[str, torch.Tensor]:
    """Make a model's inputs of one short sequence.

    Args:
        model: on its device.
        token_ids: of the sequence.
        positions: of the tokens; None leaves them to the model.
    """
    inputs = {"input_ids": torch.tensor([token_ids], device=model.device)}
    if positions is not None:
        inputs["position_ids"] = torch.tensor([positions], device=model.device)
    return inputs


def probe(model: PreTrainedModel, token_ids: list[int], positions: list[int] | None = None) -> torch.Tensor:
    """Compute the logits of one short sequence.

    Args:
        model: in evaluation mode.
        token_ids: of the sequence.
        positions: of the tokens; None leaves them to the model.

    Returns:
        [tokens, vocabulary] fp32.
    """
    logits: torch.Tensor = model(**probe_inputs(model, token_ids, positions), use_cache=False).logits[0].float()
    return logits


def tolerance_of(model: PreTrainedModel) -> float:
    """Return by how much another kernel may round differently, as a share; a leak adds more."""
    return 1e-4 if model.dtype == torch.float32 else 5e-2


def are_close(model: PreTrainedModel, logits: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether logits differ by no more than rounding.

    Args:
        model: its dtype says how much that is.
        logits: [tokens, vocabulary].
        expected: of the same shape.
    """
    return bool((logits - expected).abs().max() <= tolerance_of(model) * expected.abs().max())  # a NaN is not close


def trace(model: PreTrainedModel, token_ids: list[int], positions: list[int] | None) -> list[torch.Tensor]:
    """Return what each decoder layer makes of a sequence, [1, tokens, width], and its logits, [tokens, vocabulary].

    Args:
        model: in evaluation mode. One without known layers yields its logits alone.
        token_ids: of the sequence.
        positions: of the tokens; None leaves them to the model.
    """
    outputs_of_layers = []

    def keep(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], outputs: Any) -> None:
        outputs_of_layers.append(_hidden(outputs))

    with _hooked(model, keep):
        logits = probe(model, token_ids, positions)
    return [*outputs_of_layers, logits]


def agrees_layer_by_layer(
    model: PreTrainedModel,
    expected: list[torch.Tensor],
    tolerance: float,
    token_ids: list[int],
    positions: list[int] | None,
) -> bool:
    """Return whether each layer adds to its inputs what a trace says, up to rounding, and the head does the same.

    Each layer is given the inputs that it had in the trace: in bf16 rounding grows over 30 layers beyond what a leak
    adds.

    Args:
        model: in evaluation mode.
        expected: from `trace`.
        tolerance: as a share of what a layer adds.
        token_ids: of the sequence.
        positions: of the tokens; None leaves them to the model.
    """
    verdicts, remaining = [], iter(expected)

    def compare(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], outputs: Any) -> Any:
        before = inputs[0] if inputs else named["hidden_states"]
        wanted = next(remaining)
        error, added = (_hidden(outputs) - wanted).float().norm(), (wanted - before).float().norm()
        verdicts.append(error <= tolerance * added)
        return (wanted, *outputs[1:]) if isinstance(outputs, tuple) else wanted

    with _hooked(model, compare):
        logits = probe(model, token_ids, positions)
    return all(map(bool, verdicts)) and are_close(model, logits, next(remaining))


def depends_on_others(
    model: PreTrainedModel, one: list[int], other: list[int], positions: list[int] | None, compared: slice
) -> bool:
    """Return whether some part of the model makes something else of the same tokens where the others are changed.

    Args:
        model: in evaluation mode. Of one without known layers the logits alone are compared.
        one: a sequence of token ids.
        other: one that has the same tokens in the compared places.
        positions: of the tokens; None leaves them to the model.
        compared: the places.
    """
    return not largest_dependence(model, one, other, positions, compared) <= dependence_tolerance(model)  # NaN is none


def dependence_tolerance(model: PreTrainedModel) -> float:
    """Return which share of a part's outputs another order of sums may change.

    Experts that are off by 3e-7 each change 4e-7 in fp32 and up to 1e-5 in bf16, at a width of 32. On a CPU, those of
    21 families change up to 1e-7 in fp32. A layer that leaks a thousandth of what it adds changes 4e-4 or more in fp32
    and 7e-5 or more in bf16, which rounds most of such a leak away.
    """
    return 5e-5 if model.dtype in (torch.bfloat16, torch.float16) else 1e-5


def largest_dependence(
    model: PreTrainedModel, one: list[int], other: list[int], positions: list[int] | None, compared: slice
) -> float:
    """Return how much other tokens change what a part of the model makes of the same ones, as in `depends_on_others`.

    Layers are compared by what they add to their inputs, their parts and the head by their outputs: a layer's rounding
    may hide what a part does, and a layer may do what no part does. Each layer is given the inputs of the first pass.

    Returns:
        The largest share: sum |difference| / sum |value| of each token, averaged over tokens. In bf16 a small
        difference shows in few elements, each by a whole unit of rounding: its sum of magnitudes is right on average.
    """
    layers = set(_known_layers(model))
    known: list[torch.Tensor | None] = []
    shares: list[torch.Tensor] = []

    def keep(part: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], outputs: Any) -> None:
        ours = _tokens_of(outputs, len(one), compared)
        known.append(None if ours is None else ours.clone())  # the next part may work in place

    def compare(part: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], outputs: Any) -> Any:
        wanted, ours = next(remaining), _tokens_of(outputs, len(one), compared)
        if wanted is None or ours is None:
            return None
        if part not in layers:
            shares.append(_share(ours, wanted, wanted))
            return None
        before = _tokens_of(inputs[0] if inputs else named["hidden_states"], len(one), compared)
        shares.append(_share(ours, wanted, wanted if before is None else wanted - before))
        replaced = _hidden(outputs).clone()
        _tokens_of(replaced, len(one), compared).copy_(wanted)  # type: ignore[union-attr]
        return (replaced, *outputs[1:]) if isinstance(outputs, tuple) else replaced

    with _hooked(model, keep, with_parts=True):
        logits = probe(model, one, positions)[compared]
    remaining = iter(known)
    with _hooked(model, compare, with_parts=True):
        shares.append(_share(probe(model, other, positions)[compared], logits, logits))
    return float(torch.stack(shares).max())


def _share(ours: torch.Tensor, wanted: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Return how much tokens [tokens, ...] differ, as a share of a base."""
    error, size = (each.float().abs().flatten(1).sum(1) for each in (ours.float() - wanted.float(), base))
    return (error / size.clamp_min(torch.finfo(torch.float32).tiny)).mean()


def _tokens_of(outputs: Any, count: int, compared: slice) -> torch.Tensor | None:
    """Return some tokens of a part's outputs as [tokens, ...], a view; None where outputs are not by token."""
    hidden = _hidden(outputs)
    if not isinstance(hidden, torch.Tensor) or not hidden.is_floating_point():
        return None
    # Most families have [..., tokens, width]; some carry several streams, [1, tokens, streams, width].
    place = next((each for each in (-2, 1) if hidden.dim() > 1 and hidden.shape[each] == count), None)
    return None if place is None else hidden.movedim(place, 0)[compared]


def _hidden(outputs: Any) -> torch.Tensor:
    hidden: torch.Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
    return hidden


def _known_layers(model: PreTrainedModel) -> list[nn.Module]:
    with suppress(ModelError):
        return list(decoder_layers(model))
    return []


@contextmanager
def _hooked(model: PreTrainedModel, hook: Callable[..., Any], *, with_parts: bool = False) -> Iterator[None]:
    """Call a hook after each decoder layer, and after their parts if asked; a model without known layers calls none."""
    modules = [
        module for layer in _known_layers(model) for module in (*(layer.children() if with_parts else ()), layer)
    ]
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
