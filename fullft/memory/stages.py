"""Stages of sharding: which of them ranks can use for a model."""

from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights

from fullft.config.config import Config
from fullft.errors import OptionsError
from fullft.memory.plan import layer_pattern, shortened
from fullft.optim.build import find_torn_block, torn_block_error

# From the one that sends least to the one that keeps least; last, what is for models that the others cannot serve.
STAGES = ("optimizer", "gradients", "full", "none")
# How families call the number of experts in their configs.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def possible_stages(config: Config, model_config: PreTrainedConfig) -> list[str]:
    """Return what `--shard` may be, in the order of `STAGES`.

    Args:
        config: its ranks and the optimizer are read.
        model_config: of a causal language model.
    """
    torn = _torn_block(replace(config, shard="full"), model_config) is not None
    has_experts = _has_experts(model_config)
    return [
        stage
        for stage in STAGES
        if not (torn and stage != "none") and not (has_experts and stage in ("none", "optimizer"))
    ]


def require_stage(config: Config, model_config: PreTrainedConfig) -> None:
    """Check what was asked for.

    Args:
        config: `shard` and the optimizer are read.
        model_config: of a causal language model.

    Raises:
        OptionsError: the model cannot be trained in this way.
    """
    if _has_experts(model_config) and config.shard == "optimizer":
        raise OptionsError(
            "shard optimizer adds up whole gradients over micro-batches, which FSDP cannot do for experts that get no "
            "token: use --shard gradients, or full"
        )
    if (name := _torn_block(config, model_config)) is not None:
        raise torn_block_error(config, name)


def _has_experts(model_config: PreTrainedConfig) -> bool:
    text = model_config.get_text_config(decoder=True)
    return any((getattr(text, name, None) or 0) > 1 for name in _EXPERTS)


def _torn_block(config: Config, model_config: PreTrainedConfig) -> str | None:
    if not config.has_8bit_moments or config.shard == "none":
        return None
    layers = sum(layer_pattern(model_config))  # one of each kind
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(shortened(model_config, layers))
    model.requires_grad_(True).tie_weights()
    return find_torn_block(model, config.numerics, config.group.count)
