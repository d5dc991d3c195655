"""Losses besides cross entropy that a model's config asks for: those that transformers would add are refused.

They are not linear in the tokens: a balance of the experts is a product of two means over the micro-batch. So their
gradients would depend on how a step is dealt into micro-batches.
"""

from typing import Any

from transformers import PreTrainedConfig

from fullft.errors import ModelError

# What `forward(labels=...)` of transformers' families weighs its routers' loss with, if `output_router_logits` is on.
_ROUTER_WEIGHTS = ("router_aux_loss_coef", "router_z_loss_coef", "aux_loss_coef", "moe_loss_weight")
# What is added whenever labels are given.
_ALWAYS_ADDED = ("z_loss_coefficient",)
# What code that comes with a model adds, but transformers' own code for the same family does not (DeepSeek-V2).
_REMOTE = ("aux_loss_alpha",)
# Layers that predict further tokens. transformers does not build them.
_FURTHER_TOKENS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")


def require_cross_entropy_alone(model_config: PreTrainedConfig, name: str) -> None:
    """Check that a config asks for no loss that would be left out.

    Args:
        model_config: as loaded.
        name: what the user calls the model.

    Raises:
        ModelError: naming the field that asks for one, and how to do without.
    """
    for values in _parts(model_config):
        if values.get("output_router_logits") and (found := _weighted(values, _ROUTER_WEIGHTS)):
            field, remedy = f"output_router_logits with {found}", "output_router_logits to false"
        elif found := _weighted(values, (*_ALWAYS_ADDED, *(_REMOTE if _has_own_code(model_config) else ()))):
            field, remedy = found, f"{found.split()[0]} to 0"
        elif (kind := values.get("loss_type")) and not str(kind).endswith(("CausalLM", "ConditionalGeneration")):
            field, remedy = f"loss_type {kind}", "loss_type to null"
        else:
            continue
        raise ModelError(
            f"the config.json of {name} asks for another loss besides cross entropy ({field}), which depends on how a "
            f"step is dealt into micro-batches and is not offered: set {remedy} there to train without it"
        )


def describe_left_out(model_config: PreTrainedConfig) -> list[str]:
    """Return warnings of what a config mentions and neither transformers nor this program trains.

    Args:
        model_config: of a model that `require_cross_entropy_alone` has passed.
    """
    fields = {
        field: f"warning: {found} in config.json is left out, as by transformers: cross entropy alone is trained"
        for values in _parts(model_config)
        for field in (*_REMOTE, *_FURTHER_TOKENS)
        if (found := _weighted(values, (field,)))
    }
    return list(fields.values())


def _has_own_code(model_config: PreTrainedConfig) -> bool:
    return not type(model_config).__module__.startswith("transformers.")


def _parts(model_config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Return a config's fields, those of its text model, and of the parts that hold losses (DBRX's `ffn_config`)."""
    whole, text = model_config.to_dict(), model_config.get_text_config(decoder=True).to_dict()
    return [part | (part.get("ffn_config") or {}) for part in (whole, text)]


def _weighted(values: dict[str, Any], fields: tuple[str, ...]) -> str | None:
    """Return the first field with a weight above 0, and the weight."""
    found = ((field, values.get(field)) for field in fields)
    return next(
        (f"{field} {weight}" for field, weight in found if isinstance(weight, int | float) and weight > 0), None
    )
