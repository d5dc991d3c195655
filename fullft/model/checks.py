"""Checks of a loaded model against the data and against what training relies on. They change nothing."""

from transformers import PreTrainedConfig, PreTrainedModel

from fullft.errors import ModelError, OptionsError
from fullft.model.head import Head
from fullft.model.parts import decoder_of
from fullft.model.probing import (
    DOCUMENT,
    TWO_DOCUMENTS,
    agrees_layer_by_layer,
    are_close,
    depends_on_others,
    probe,
    probe_inputs,
    probing,
    tolerance_of,
    trace,
)

_ALONE = "train it without --packing, and with --per_device_train_batch_size 1"


def check_model(model: PreTrainedModel, largest_token_id: int, longest: int, joins_rows: bool) -> None:
    """Check that the data and the model belong together, and that the model can be trained as it is here.

    Args:
        model: loaded, on its device.
        largest_token_id: over all rows.
        longest: tokens of the longest sequence.
        joins_rows: whether a row holds several documents.

    Raises:
        ModelError: a token has no embedding; a token sees what comes after it; of a row, a document sees another;
            the model's logits are not those that its head makes of its decoder's outputs.
        OptionsError: sequences are longer than the model has positions.
    """
    embeddings = model.get_input_embeddings().weight.shape[0]
    if largest_token_id >= embeddings:
        raise ModelError(
            f"the data has token {largest_token_id}, the model only {embeddings} embeddings: the tokenizer and the "
            "weights do not belong together; take both from the same model"
        )
    check_positions(model.config, longest)
    with probing(model):
        _check_head(model)
        _check_causality(model)
        if joins_rows:
            _check_isolation(model)


def check_positions(model_config: PreTrainedConfig, longest: int) -> None:
    """Check that the model has a position for every token of a sequence.

    Args:
        model_config: of a causal language model.
        longest: tokens of the longest sequence.

    Raises:
        OptionsError: it has fewer.
    """
    positions = getattr(model_config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions and longest > positions:
        raise OptionsError(
            f"max_length: a sequence of {longest} tokens is longer than the model's {positions} positions: "
            f"pass --max_length {positions}"
        )


def _check_head(model: PreTrainedModel) -> None:
    """Check that logits made as training makes them are the model's."""
    decoder = decoder_of(model)
    outputs = decoder(**probe_inputs(model, DOCUMENT, None), use_cache=False)
    hidden = getattr(outputs, "last_hidden_state", None)
    if hidden is None or not are_close(
        model, Head(model, decoder, type(outputs))(hidden)[0].float(), probe(model, DOCUMENT)
    ):
        raise ModelError(f"{type(model).__name__} mixes its head with its decoder: such models cannot be trained yet")


def _check_causality(model: PreTrainedModel) -> None:
    if depends_on_others(model, [*DOCUMENT, 1], [*DOCUMENT, 2], None, slice(0, len(DOCUMENT))):
        raise ModelError(
            f"{type(model).__name__} lets a token see the tokens after it: it is not a causal language model; choose "
            "a decoder"
        )


def _check_isolation(model: PreTrainedModel) -> None:
    """Check that a document gives the same behind any other, and layer by layer nearly so alone."""
    count = len(DOCUMENT)
    behind_one, behind_another = DOCUMENT + DOCUMENT, DOCUMENT[::-1] + DOCUMENT
    second = slice(count, 2 * count)
    try:
        is_alike = not depends_on_others(model, behind_one, behind_another, TWO_DOCUMENTS, second)
    except TypeError as error:
        raise ModelError(f"{type(model).__name__} takes no position_ids: {_ALONE}") from error
    behind = [each[..., second, :] for each in trace(model, behind_one, TWO_DOCUMENTS)]
    # Alone its products have another size, and round differently: a router, too, may choose another expert for a token.
    tolerance = 4 * tolerance_of(model)
    if not is_alike or not agrees_layer_by_layer(model, behind, tolerance, DOCUMENT, TWO_DOCUMENTS[:count]):
        raise ModelError(f"{type(model).__name__} lets documents of one row see each other: {_ALONE}")
