"""Probing: what a loaded model makes of a few tokens, as a whole and layer by layer.

Logits of unlikely tokens are no measure in bf16: for token ids 1 to 32 those of SmolLM2 are off by 44% of the largest,
by rounding alone. Layer by layer, on the same inputs, rounding is 1.2% of what a layer adds, and documents that see
each other make 48%.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fullft.errors import ModelError
from fullft.model.parts import decoder_layers

# Token ids that every vocabulary has, and the positions of two packed documents of as many tokens.
DOCUMENT = list(range(1, 33))
TWO_DOCUMENTS = list(range(len(DOCUMENT))) * 2


@contextmanager
def probing(model: PreTrainedModel) -> Iterator[None]:
    """Switch dropout and gradients off for some probes.

    Args:
        model: its training mode is restored.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
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


def _hidden(outputs: Any) -> torch.Tensor:
    hidden: torch.Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
    return hidden


@contextmanager
def _hooked(model: PreTrainedModel, hook: Callable[..., Any]) -> Iterator[None]:
    """Call a hook after each decoder layer; a model without known layers calls none."""
    layers: Iterable[nn.Module] = ()
    with suppress(ModelError):
        layers = decoder_layers(model)
    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
