"""The choice of how a model attends: document by document with an operator of ours, or as transformers has it.

On a CPU `documents` attends, packed or not. On CUDA `packed` attends to packed sequences, and torch's fused kernels to
others.
"""

import inspect

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from fullft.attention import documents, packed
from fullft.model.probing import DOCUMENT, TWO_DOCUMENTS, agrees_layer_by_layer, probing, tolerance_of, trace


def choose_attention(model: PreTrainedModel, joins_rows: bool) -> None:
    """Switch a model to attention by document, where that gives the same result.

    One line says why rows of several documents keep a mask.

    Args:
        model: loaded; changed in place.
        joins_rows: whether a row holds several documents.
    """
    own, device = attention_of(model), model.device.type
    refusal = "its attention is a kind of its own"
    if attend_by_document(model) or (joins_rows and attend_packed(model, device)):
        refusal = _refusal(model, own, joins_rows)
        if refusal:
            model.set_attn_implementation(own)
    if refusal and joins_rows:
        name = type(model).__name__
        print(f"warning: {name} attends to rows of several documents with a mask of length² in each layer: {refusal}")


def _refusal(model: PreTrainedModel, own: str | None, joins_rows: bool) -> str:
    """Compare a model's attention, which is ours by now, with its own on a few tokens; return why it may not be used.

    Args:
        model: switched back and forth.
        own: the name of its own attention.
        joins_rows: whether to compare two documents, or one.
    """
    ours = attention_of(model)
    ids, positions = (DOCUMENT + DOCUMENT[::-1], TWO_DOCUMENTS) if joins_rows else (DOCUMENT, None)
    try:
        with probing(model):
            model.set_attn_implementation(own)
            expected = trace(model, ids, positions)
            model.set_attn_implementation(ours)
            agrees = agrees_layer_by_layer(model, expected, tolerance_of(model), ids, positions)
    except Exception as error:  # a family may pass on what ours cannot take; one without positions is refused later
        return str(error).strip().split("\n")[0] or type(error).__name__
    return "" if agrees else "ours gives another result"


def attend_by_document(model: PreTrainedModel) -> bool:
    """Switch a model to attention by document; positions that restart at 0 mark the documents.

    Args:
        model: changed in place, if it attends by torch's kernel on a CPU.

    Returns:
        Whether it was changed.
    """
    is_sdpa, is_on_cpu = attention_of(model) == "sdpa", model.device.type == "cpu"
    if not (is_sdpa and is_on_cpu and model._supports_attention_backend):
        return False
    model.set_attn_implementation(documents.NAME)
    return True


def attend_packed(model: PreTrainedModel, device_type: str) -> bool:
    """Switch a model to attention within packed documents on CUDA.

    Args:
        model: changed in place, if torch's kernel could do what its attention does, but for a soft cap.
        device_type: of the device that it computes on, or that a plan is made for.

    Returns:
        Whether it was changed.
    """
    text = model.config.get_text_config(decoder=True)
    has_softcap = getattr(text, "attn_logit_softcapping", None) is not None  # then transformers takes no kernel
    is_known = attention_of(model) == ("eager" if has_softcap else "sdpa")
    if not (is_known and device_type == "cuda" and model._supports_attention_backend):
        return False
    model.set_attn_implementation(packed.NAME)
    return True


def attention_of(model: PreTrainedModel) -> str | None:
    """Return the name of a model's attention, as `from_pretrained` takes it."""
    name: str | None = model.config._attn_implementation
    return name


# ---------------------------------------------------------------------------------------------- rows that are joined

# Layers whose tokens see no other documents, if positions restart.
_ISOLATING_LAYERS = {"full_attention", "sliding_attention"}
# With dropout attention keeps its probabilities, as many as the square of a row's tokens, as families call it.
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")


def why_not_joined(model_config: PreTrainedConfig, device_type: str) -> str:
    """Say why documents of this model should not share a row; an empty string if they may.

    What is said here of a family is checked on the loaded model, in `model/checks.py`.

    Args:
        model_config: of a causal language model.
        device_type: of the device that it computes on, or that a plan is made for.
    """
    if device_type not in ("cpu", "cuda"):
        return f"attention on {device_type} takes memory by the square of a row's tokens"
    text = model_config.get_text_config(decoder=True)
    family = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model_config), None)
    if family is None:
        return "its code comes with the model, and may not tell documents apart"
    takes_positions = "position_ids" in inspect.signature(family.forward).parameters
    others = set(getattr(text, "layer_types", None) or ()) - _ISOLATING_LAYERS
    if family._is_stateful or not takes_positions or others or not family._supports_attention_backend:
        return f"{family.__name__} does not tell documents apart by their positions"
    if not family._supports_sdpa:
        return f"the attention of {family.__name__} takes memory by the square of a row's tokens"
    if any(getattr(text, name, 0) for name in _DROPOUTS):
        return "attention with dropout takes memory by the square of a row's tokens"
    return ""
