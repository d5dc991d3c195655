"""The optimizer: what the options make of it, parameter groups, the learning rate of every step.

Owns choices. The step itself is `adamw.py`'s business, what gradients it takes `gradients.py`'s.
"""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from fullft.config.config import Config, parse_offload
from fullft.optim.adamw import AdamW, Placement, state_layout
from fullft.storage.tiers import Storage

# ---------------------------------------------------------------------------------------------- optimizers

_LEAST_IN_8_BITS = 16384  # elements: no norm of a usual width has as many


def build_optimizer(model: nn.Module, config: Config, storage: Storage) -> AdamW:
    """Build the optimizer that `--optim` names, over all parameters of the model.

    Args:
        model: on its final device, in its final dtype.
        config: the options of the groups "optimization" and "precision and memory" count, without any auto.
        storage: makes the states, and the gradients' sums, where they are to live.
    """
    masters = config.master_weights if config.precision == "bf16-true" else "none"
    is_in_fp32 = config.precision == "bf16-true" and masters != "none"
    accumulates = (config.gradient_accumulation_steps or 1) > 1
    optimizer = AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        moments=moments_of(model, config),
        masters=masters,
        gradient_dtype=torch.float32 if is_in_fp32 and accumulates else None,
        placement=placement_of(config),
        storage=storage,
        seed=config.seed,
    )
    if (layer_stream := getattr(model, "layer_stream", None)) is not None:
        optimizer.register_step_pre_hook(lambda *_: layer_stream.release())
    return optimizer


def placement_of(config: Config) -> Placement:
    """Say where things live.

    Args:
        config: `offload` and `optim` count.
    """
    placement = Placement(**parse_offload(config.offload))
    return replace(placement, optimizer="paged") if config.optim == "paged_adamw_8bit" else placement


def moments_of(model: nn.Module, config: Config) -> Callable[[nn.Parameter], torch.dtype]:
    """Give the dtype of each parameter's moments.

    Args:
        model: tells embeddings from other parameters.
        config: `optim`, `precision` and `master_weights` count.

    Returns:
        A function of the parameter; uint8 stands for blocks of 8-bit numbers.
    """
    if config.optim == "adamw":
        if config.precision == "bf16-true" and config.master_weights != "none":
            return lambda parameter: torch.float32
        return lambda parameter: parameter.dtype  # as torch does
    # Embeddings keep 32-bit states: their gradients are too uneven for blocks (Source: Dettmers et al., "8-bit
    # Optimizers via Block-wise Quantization", section 2.3).
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}

    def moments(parameter: nn.Parameter) -> torch.dtype:
        is_small = parameter.numel() < _LEAST_IN_8_BITS
        return torch.float32 if is_small or id(parameter) in embeddings else torch.uint8

    return moments


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
    """Say which states the optimizer keeps, in which dtype and where."""
    moments = "8 bits (embeddings and small tensors: fp32)"
    if config.optim == "adamw":
        # torch keeps the moments in the parameter's dtype.
        moments = "bf16" if config.precision == "bf16-true" and config.master_weights == "none" else "fp32"
    parts = [f"{config.optim}, two moments per parameter in {moments}"]
    if config.precision == "bf16-true":
        parts.append(f"master weights: {config.master_weights}")
    if placed := parse_offload(config.offload):
        parts.append("offloaded: " + ", ".join(f"{what} to {where}" for what, where in placed.items()))
    return "; ".join(parts)


def estimate_state_bytes(config: Config, model: nn.Module) -> int:
    """Count the bytes of the optimizer's states."""
    moments = moments_of(model, config)
    return sum(
        numel * dtype.itemsize
        for parameter in model.parameters()
        for numel, dtype in state_layout(parameter, moments(parameter), config.master_weights).values()
    )


# ---------------------------------------------------------------------------------------------- learning rate


def build_schedule(config: Config, total_steps: int) -> Callable[[int], float]:
    """Build the learning rate as a pure function of the step, so that resuming has nothing to restore.

    Args:
        config: `learning_rate`, `lr_scheduler_type` and `warmup_steps` count.
        total_steps: optimizer steps of the whole run.

    Returns:
        A function from the step, counted from 1, to its learning rate.
    """
    warmup = config.warmup_steps
    warmup = math.ceil(total_steps * warmup) if warmup < 1 else int(warmup)
    # transformers' `constant` would silently ignore a warmup.
    name = "constant_with_warmup" if config.lr_scheduler_type == "constant" else config.lr_scheduler_type
    nothing = torch.optim.SGD([torch.zeros(1)], lr=1.0)  # get_scheduler wants an optimizer; we want only its formula
    factor = get_scheduler(name, nothing, num_warmup_steps=warmup, num_training_steps=total_steps).lr_lambdas[0]
    return lambda step: config.learning_rate * float(factor(step - 1))
