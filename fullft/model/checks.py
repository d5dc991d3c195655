"""Probes: what a loaded model does with a few tokens, before it is trained on any.

Owns the checks that need its weights (that it belongs to the data, is causal, keeps packed documents apart, and has a
head that can be told from its decoder), and the choice of how a CPU attends and where it puts what is large.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fullft.attention.documents import apply_document_attention, revert_document_attention
from fullft.cpu.recycling import apply_recycling
from fullft.errors import ModelError, OptionsError
from fullft.model.head import Head
from fullft.model.parts import decoder_layers, decoder_of

# Token ids that every vocabulary has, and with packing the positions of two documents of so many.
_DOCUMENT = list(range(1, 33))
_TWO_DOCUMENTS = list(range(len(_DOCUMENT))) * 2


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
        theirs = _trace(model, *probe)
        apply_document_attention(model)
        agrees = _agrees_in_each_layer(model, theirs, _tolerance(model), *probe)
    except Exception:  # whatever a family passes on that ours cannot take; without positions: said later
        agrees = False
    if not agrees:
        revert_document_attention(model)


def _trace(model: PreTrainedModel, token_ids: list[int], positions: list[int] | None) -> list[torch.Tensor]:
    """Give what each decoder layer makes of a sequence, [1, tokens, width], and its logits, [tokens, vocabulary]."""
    trace = []

    def keep(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], outputs: Any) -> None:
        trace.append(_hidden(outputs))

    with _hooked(model, keep):
        logits = _probe(model, token_ids, positions)
    return [*trace, logits]


def _agrees_in_each_layer(
    model: PreTrainedModel,
    trace: list[torch.Tensor],
    tolerance: float,
    token_ids: list[int],
    positions: list[int] | None,
) -> bool:
    """Tell whether each layer adds to its inputs what a trace says, to rounding, and the head makes the same of them.

    Each gets the inputs that it got then: in bf16 rounding grows over 30 layers beyond what a leak adds.
    """
    verdicts, remaining = [], iter(trace)

    def compare(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], outputs: Any) -> Any:
        before = inputs[0] if inputs else named["hidden_states"]
        expected = next(remaining)
        error, added = (_hidden(outputs) - expected).float().norm(), (expected - before).float().norm()
        verdicts.append(error <= tolerance * added)
        return (expected, *outputs[1:]) if isinstance(outputs, tuple) else expected

    with _hooked(model, compare):
        logits = _probe(model, token_ids, positions)
    return all(map(bool, verdicts)) and _are_close(model, logits, next(remaining))


def _hidden(outputs: Any) -> torch.Tensor:
    hidden: torch.Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
    return hidden


@contextmanager
def _hooked(model: PreTrainedModel, hook: Callable[..., Any]) -> Iterator[None]:
    """Have a hook see what each decoder layer is given and gives; of a model without known layers, nothing."""
    layers: Iterable[nn.Module] = ()
    with suppress(ModelError):
        layers = decoder_layers(model)
    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
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
    """Check that a document gives the same behind any other one, to the bit, and layer by layer nearly so alone."""
    count = len(_DOCUMENT)
    try:
        traces = [_trace(model, other + _DOCUMENT, _TWO_DOCUMENTS) for other in (_DOCUMENT, _DOCUMENT[::-1])]
    except TypeError as error:
        raise ModelError(f"{type(model).__name__} takes no position_ids: train it without --packing") from error
    behind, behind_another = ([each[..., count:, :] for each in trace] for trace in traces)
    is_alike = torch.equal(behind[-1], behind_another[-1])
    # Products of another size: a router, too, may choose another expert for a token.
    tolerance = 4 * _tolerance(model)
    if not is_alike or not _agrees_in_each_layer(model, behind, tolerance, _DOCUMENT, _TWO_DOCUMENTS[:count]):
        raise ModelError(f"{type(model).__name__} lets packed documents see each other: train it without --packing")
