"""Models that are sharded by FSDP2 alone, without what the program does besides."""

import math
from collections.abc import Callable
from typing import Any

import torch
from ranks import run_on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from fullft.model.parts import decoder_layers

HYBRID = (2, 2)  # two copies, two ranks that share each


def odd_model(tied: bool = False, hidden_size: int = 48, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A Llama whose rows no number of ranks divides."""
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=hidden_size,
        intermediate_size=5,  # of 4 ranks one gets none
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def shard_plainly(model: PreTrainedModel, shape: tuple[int, ...]) -> None:
    """Shard a model over ranks arranged in this shape; (1,) leaves it whole."""
    if shape == (1,):
        return
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    for unit in (*decoder_layers(model), model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)


def on_ranks(shape: tuple[int, ...], function: Callable[[], Any]) -> list[Any]:
    """Call a function on ranks arranged in a shape, or in this process for (1,)."""
    return [function()] if shape == (1,) else run_on_ranks(math.prod(shape), function)
