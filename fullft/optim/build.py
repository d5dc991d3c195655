"""Building the optimizer from the options: parameter groups, formats, placement.

The step itself is the business of `adamw.py`.
"""

import re
from collections.abc import Callable
from typing import Any

from torch import dtype, float32, nn, uint8

from fullft.config.config import Config
from fullft.config.numerics import Format, Numerics
from fullft.errors import OptionsError
from fullft.model.precision import dtype_of
from fullft.optim.adamw import AdamW, layout_of
from fullft.optim.adamw_8bit import BLOCK
from fullft.storage.tiers import Storage, row_range
from fullft.transforms.streaming import stream_of

_LEAST_IN_8_BITS = 16384  # elements: no norm of a usual width has as many


def build_optimizer(model: nn.Module, config: Config, storage: Storage) -> AdamW:
    """Build the optimizer that the options name, over all parameters of the model.

    Args:
        model: on its final device, in its final dtype.
        config: nothing is left to the plan.
        storage: makes the states and the gradients' sums, where they are to live.

    Raises:
        OptionsError: ranks cannot share out the blocks of 8-bit moments.
    """
    numerics, layers = config.numerics, stream_of(model)
    if (name := find_torn_block(model, numerics, config.group.count)) is not None:
        raise torn_block_error(config, name)
    return AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        moments=moments_of(model, numerics),
        masters=numerics.masters,
        gradient_dtype=None if numerics.gradients is numerics.weights else dtype_of(numerics.gradients),
        placement=config.placement,
        storage=storage,
        seed=config.seed,
        before_step=(lambda: None) if layers is None else layers.release,
    )


def moments_of(model: nn.Module, numerics: Numerics) -> Callable[[nn.Parameter], dtype]:
    """Return the dtype of each parameter's moments.

    Args:
        model: tells embeddings from other parameters.
        numerics: the run's formats.

    Returns:
        A function of the parameter; uint8 stands for blocks of 8-bit numbers.
    """
    if numerics.moments is not Format.EIGHT_BIT:
        if numerics.moments is numerics.weights:
            return lambda parameter: parameter.dtype  # as torch does; a family may keep some parameters in fp32
        return lambda parameter: dtype_of(numerics.moments)
    # Embeddings keep 32-bit states: their gradients are too uneven for blocks (Source: Dettmers et al., "8-bit
    # Optimizers via Block-wise Quantization", section 2.3).
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}

    def moments(parameter: nn.Parameter) -> dtype:
        is_small = parameter.numel() < _LEAST_IN_8_BITS
        return float32 if is_small or id(parameter) in embeddings else dtype_of(Format.EIGHT_BIT)

    return moments


def find_torn_block(model: nn.Module, numerics: Numerics, count: int) -> str | None:
    """Return the name of a parameter whose rows, shared out, would begin inside a block of 8-bit moments.

    Args:
        model: its parameters may be sharded already; their whole shapes are read.
        numerics: the run's formats.
        count: of the ranks that share them.
    """
    moments = moments_of(model, numerics)
    for name, parameter in model.named_parameters():
        if moments(parameter) is not uint8 or parameter.dim() == 0:
            continue
        rows, width = row_range(len(parameter), 0, count)[1], parameter.numel() // len(parameter)
        if rows < len(parameter) and rows * width % BLOCK:
            return name
    return None


def torn_block_error(config: Config, name: str) -> OptionsError:
    """Describe what `find_torn_block` has found.

    Args:
        config: its ranks and sharding are named.
        name: of the parameter.
    """
    return OptionsError(
        f"optim {config.optim} with shard {config.shard} over {config.group.count} ranks: the rows of {name} that each "
        f"rank gets are no whole number of blocks of {BLOCK} elements: use --optim adamw, --shard none, or another "
        "number of ranks"
    )


# Source: transformers, `Trainer.get_decay_parameter_names`.
_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the parameters into decayed ones and, as Hugging Face does, undecayed biases and norms.

    Args:
        model: tied parameters appear once.
        weight_decay: of the first group.
    """
    norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.LayerNorm)
        for parameter in module.parameters(recurse=False)
    }
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        skipped = id(parameter) in norms or _UNDECAYED.search(name.lower())
        (undecayed if skipped else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def describe_optimizer(config: Config) -> str:
    """Say which states the optimizer keeps, in which format and where."""
    numerics, offloaded = config.numerics, config.placement.offloaded
    names = {
        Format.FP32: "fp32",
        Format.BF16: "bf16",
        Format.EIGHT_BIT: "8 bits (embeddings and small tensors: fp32)",
    }
    parts = [f"{config.optim}, two moments per parameter in {names[numerics.moments]}"]
    if numerics.weights is Format.BF16:
        parts.append(f"master weights: {numerics.masters}")
    if offloaded:
        parts.append("offloaded: " + ", ".join(f"{what} to {tier}" for what, tier in offloaded.items()))
    return "; ".join(parts)


def estimate_state_bytes(model: nn.Module, numerics: Numerics) -> int:
    """Count the bytes of the optimizer's states, those of all ranks together.

    Args:
        model: its parameters are counted, as whole ones.
        numerics: the run's formats.
    """
    moments = moments_of(model, numerics)
    return sum(
        numel * dtype.itemsize
        for parameter in model.parameters()
        for numel, dtype in layout_of(parameter.numel(), parameter.dtype, moments(parameter), numerics.masters).values()
    )
