"""Facts that follow from a model's shapes alone: counts of parameters, operations and optimizer states.

As in the plan, two models of a few layers are built, and the line through them is continued: every count is linear in
the number of layers that repeat.
"""

from dataclasses import dataclass, fields

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from fullft.config.numerics import Numerics
from fullft.memory.plan import layer_pattern, num_layers, shortened
from fullft.model.parts import count_parameters, decoder_layers, flops_per_token
from fullft.optim.build import estimate_state_bytes

LORA_RANK = 8
# The projections to queries and values, or the matrix that they are part of, as families call them.
_QUERIES_AND_VALUES = ("q_proj", "v_proj", "query", "value", "c_attn", "qkv_proj", "query_key_value", "Wqkv")


@dataclass(frozen=True)
class Facts:
    """Counts of one model.

    Attributes:
        parameters: all of them, tied ones once.
        layer_parameters: those in the decoder layers.
        layer_matrices: parameters in the decoder layers' matrices.
        matrices: the same and the output head: what a token is multiplied with.
        lora_parameters: of adapters of rank `LORA_RANK` on queries and values.
        states_8bit: bytes of AdamW's moments in 8 bits, without the remainders of split masters.
        flops_per_token: operations of forward and backward, without recomputation.
    """

    parameters: int
    layer_parameters: int
    layer_matrices: int
    matrices: int
    lora_parameters: int
    states_8bit: int
    flops_per_token: int


def find_facts(model_config: PreTrainedConfig, length: int) -> Facts:
    """Count a model's parameters and what follows from them.

    Args:
        model_config: of a causal language model.
        length: tokens per sequence, for attention's share of the operations.
    """
    layers, (first, period) = num_layers(model_config), layer_pattern(model_config)
    few = first + period + (layers - first) % period
    if few + period >= layers:
        return _count(model_config, layers, length)
    small, large = _count(model_config, few, length), _count(model_config, few + period, length)
    times = (layers - few) // period
    return Facts(*(_continue(getattr(small, f.name), getattr(large, f.name), times) for f in fields(Facts)))


def _continue(small: int, large: int, times: int) -> int:
    return small + times * (large - small)


def _count(model_config: PreTrainedConfig, layers: int, length: int) -> Facts:
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(shortened(model_config, layers))
    model.requires_grad_(True).tie_weights()
    layer_matrices = sum(p.numel() for p in decoder_layers(model).parameters() if p.dim() > 1)
    head = model.get_output_embeddings()
    return Facts(
        count_parameters(model),
        sum(p.numel() for p in decoder_layers(model).parameters()),
        layer_matrices,
        layer_matrices + (0 if head is None else head.weight.numel()),
        _lora_parameters(model),
        estimate_state_bytes(model, Numerics.of("fp32", "none", "adamw_8bit", accumulates=True)),
        int(flops_per_token(model, length)),
    )


def _lora_parameters(model: PreTrainedModel) -> int:
    """Count adapters: a matrix of [n, m] gets one of [n, rank] and one of [rank, m] (Source: Hu et al. 2021)."""
    return sum(
        LORA_RANK * int(sum(module.weight.shape))
        for name, module in decoder_layers(model).named_modules()
        if name.rpartition(".")[2] in _QUERIES_AND_VALUES and getattr(module, "weight", None) is not None
    )
