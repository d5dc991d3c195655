"""The choice of how a model attends: document by document with our operator, or as transformers has it."""

from transformers import PreTrainedModel

from fullft.attention.documents import NAME
from fullft.model.probing import DOCUMENT, TWO_DOCUMENTS, agrees_layer_by_layer, probing, tolerance_of, trace


def choose_attention(model: PreTrainedModel, packing: bool) -> None:
    """Switch a model on a CPU to attention by document, where that gives the same result.

    Args:
        model: loaded; changed in place.
        packing: whether sequences hold several documents.
    """
    documents = (DOCUMENT + DOCUMENT[::-1], TWO_DOCUMENTS) if packing else (DOCUMENT, None)
    if not attend_by_document(model):
        return
    try:
        with probing(model):
            attend_as_before(model)
            own = trace(model, *documents)
            attend_by_document(model)
            agrees = agrees_layer_by_layer(model, own, tolerance_of(model), *documents)
    except Exception:  # a family may pass on what ours cannot take; one without positions is refused later
        agrees = False
    if not agrees:
        attend_as_before(model)


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
    model.set_attn_implementation(NAME)
    return True


def attend_as_before(model: PreTrainedModel) -> None:
    """Undo `attend_by_document`.

    Args:
        model: changed in place.
    """
    if attention_of(model) == NAME:
        model.set_attn_implementation("sdpa")


def attention_of(model: PreTrainedModel) -> str | None:
    """Return the name of a model's attention, as `from_pretrained` takes it."""
    name: str | None = model.config._attn_implementation
    return name
