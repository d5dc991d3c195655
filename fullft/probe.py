"""Probes: what a loaded model does with a few tokens, before it is trained on any.

Owns the checks that need its weights (that it belongs to the data, is causal, keeps packed documents apart, and has a
head that can be told from its decoder), and the choice of how a CPU attends and where it puts what is large.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fullft.attention import apply_document_attention, revert_document_attention
from fullft.errors import ModelError, OptionsError
from fullft.head import Head
from fullft.model import decoder_layers, decoder_of
from fullft.recycling import apply_recycling

# Token ids that every vocabulary has, and with packing the positions of two documents of so many.
_DOCUMENT = list(range(1, 33))
_TWO_DOCUMENTS = list(range(len(_DOCUMENT))) * 2

Probe = tuple[list[int], list[int] | None]  # token ids and positions


def require_fit(model: PreTrainedModel, largest_token_id: int, longest: int, packing: bool) -> None:
    """Check that the data and the model belong together, and settle what a CPU does in its own way.

    Args:
        model: the loaded model; it may attend by `attention.py` from now on, and its memory be recycled.
        largest_token_id: over all rows.
        longest: tokens of the longest sequence.
        packing: whether sequences hold several documents.

    Raises:
        ModelError: a token has no embedding; a token sees what comes after it; with packing, a document sees another;
            the model's logits are not its head's, of its decoder's outputs.
        OptionsError: sequences are longer than the model has positions.
    """
    embeddings = model.get_input_embeddings().weight.shape[0]
    if largest_token_id >= embeddings:
        raise ModelError(
            f"the data has token {largest_token_id}, the model only {embeddings} embeddings: the tokenizer and the "
            "weights do not belong together"
        )
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions and longest > positions:
        raise OptionsError(
            f"max_length: a sequence of {longest} tokens is longer than the model's {positions} positions"
            f": pass --max_length {positions}"
        )
    training = model.training
    model.eval()  # without dropout
    try:
        with torch.no_grad():
            _settle_attention(model, packing)
            _require_head(model)
            _require_causal_attention(model)
            if packing:
                _require_isolation(model)
    finally:
        model.train(training)
    apply_recycling(model)


def _inputs(model: PreTrainedModel, token_ids: list[int], positions: list[int] | None) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": torch.tensor([token_ids], device=model.device)}
    if positions is not None:
        inputs["position_ids"] = torch.tensor([positions], device=model.device)
    return inputs


def _probe(model: PreTrainedModel, token_ids: list[int], positions: list[int] | None = None) -> torch.Tensor:
    """Compute logits [tokens, vocabulary] of one short sequence."""
    logits: torch.Tensor = model(**_inputs(model, token_ids, positions), use_cache=False).logits[0].float()
    return logits


def _are_close(model: PreTrainedModel, logits: torch.Tensor, expected: torch.Tensor) -> bool:
    """Tell whether logits differ by no more than another kernel's rounding; what a leak adds is more."""
    return bool((logits - expected).abs().max() <= _tolerance(model) * expected.abs().max())  # a NaN is not close


def _tolerance(model: PreTrainedModel) -> float:
    return 1e-4 if model.dtype == torch.float32 else 5e-2


def _settle_attention(model: PreTrainedModel, packing: bool) -> None:
    """Let the model attend within documents by our own code, where that gives what its own gives."""
    probe = (_DOCUMENT + _DOCUMENT[::-1], _TWO_DOCUMENTS) if packing else (_DOCUMENT, None)
    if not apply_document_attention(model):
        return
    try:
        revert_document_attention(model)
        theirs = _layer_outputs(model, probe)
        apply_document_attention(model)
        are_close = _are_layers_close(model, probe, theirs)
    except Exception:  # whatever a family passes on that ours cannot take; without positions: said later
        are_close = False
    if not are_close:
        revert_document_attention(model)


def _layer_outputs(model: PreTrainedModel, probe: Probe) -> list[torch.Tensor]:
    """Give what each decoder layer makes of a probe."""
    found = []

    def keep(layer: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> None:
        found.append(_hidden(outputs))

    with _hooked(model, keep):
        _probe(model, *probe)
    return found


def _are_layers_close(model: PreTrainedModel, probe: Probe, expected: list[torch.Tensor]) -> bool:
    """Tell whether each layer adds to its inputs what it is expected to, to rounding.

    Each gets the inputs that it got before: in bf16 rounding grows over 30 layers beyond what a leak adds.
    """
    verdicts, remaining = [], iter(expected)

    def compare(layer: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> Any:
        ours, theirs, before = _hidden(outputs).float(), next(remaining), inputs[0].float()
        verdicts.append((ours - theirs.float()).norm() <= _tolerance(model) * (theirs.float() - before).norm())
        return (theirs, *outputs[1:]) if isinstance(outputs, tuple) else theirs

    with _hooked(model, compare):
        _probe(model, *probe)
    return all(map(bool, verdicts))


def _hidden(outputs: Any) -> torch.Tensor:
    hidden: torch.Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
    return hidden


@contextmanager
def _hooked(model: PreTrainedModel, hook: Callable[[nn.Module, tuple[Any, ...], Any], Any]) -> Iterator[None]:
    handles = [layer.register_forward_hook(hook) for layer in decoder_layers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _require_head(model: PreTrainedModel) -> None:
    """Check that logits made as training makes them are the model's."""
    decoder = decoder_of(model)
    outputs = decoder(**_inputs(model, _DOCUMENT, None), use_cache=False)
    hidden = getattr(outputs, "last_hidden_state", None)
    if hidden is None or not _are_close(
        model, Head(model, decoder, type(outputs))(hidden)[0].float(), _probe(model, _DOCUMENT)
    ):
        raise ModelError(f"{type(model).__name__} mixes its head with its decoder: such models cannot be trained yet")


def _require_causal_attention(model: PreTrainedModel) -> None:
    seen, changed = _probe(model, [*_DOCUMENT, 1]), _probe(model, [*_DOCUMENT, 2])
    if not torch.equal(seen[:-1], changed[:-1]):
        raise ModelError(f"{type(model).__name__} lets a token see the tokens after it: it is no causal language model")


def _require_isolation(model: PreTrainedModel) -> None:
    """Check that a document gives the same logits behind any other one, to the bit, and nearly the same alone."""
    count = len(_DOCUMENT)
    try:
        behind = _probe(model, _DOCUMENT + _DOCUMENT, _TWO_DOCUMENTS)[count:]
        behind_another = _probe(model, _DOCUMENT[::-1] + _DOCUMENT, _TWO_DOCUMENTS)[count:]
    except TypeError as error:
        raise ModelError(f"{type(model).__name__} takes no position_ids: train it without --packing") from error
    alone = _probe(model, _DOCUMENT, _TWO_DOCUMENTS[:count])
    if not torch.equal(behind, behind_another) or not _are_close(model, behind, alone):
        raise ModelError(f"{type(model).__name__} lets packed documents see each other: train it without --packing")
