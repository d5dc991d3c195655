"""The optimizer step: parameter groups, the table of optimizers, the learning rate of every step, the gradient norm.

Owns what happens between the last backward and the next forward. `OPTIMIZERS` is the one place to add an optimizer.
"""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import nn
from transformers import get_scheduler

from fullft.config import Config
from fullft.errors import OptionsError

# ---------------------------------------------------------------------------------------------- optimizers


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Build the optimizer that `--optim` names, over all parameters of the model.

    Args:
        model: on its final device, in its final dtype.
        config: `optim`, `learning_rate`, `weight_decay` and Adam's constants count.

    Raises:
        OptionsError: the library that the optimizer comes from is not installed.
    """
    return OPTIMIZERS[config.optim](
        model,
        parameter_groups(model, config.weight_decay),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )


def _adamw(model: nn.Module, groups: list[dict[str, Any]], **constants: Any) -> torch.optim.Optimizer:
    # fused: one pass over memory. foreach, torch's default on CUDA, would hold about one more copy of the parameters.
    return torch.optim.AdamW(groups, fused=True, **constants)


def _adamw_8bit(
    model: nn.Module, groups: list[dict[str, Any]], paged: bool = False, **constants: Any
) -> torch.optim.Optimizer:
    try:
        import bitsandbytes  # only here: it takes a second to import, and most runs do without
    except ImportError as error:
        raise OptionsError("--optim adamw_8bit needs bitsandbytes: pip install bitsandbytes") from error
    # Embeddings keep 32-bit states: their gradients are too uneven for 256-element blocks (Source: Dettmers et al.,
    # "8-bit Optimizers via Block-wise Quantization", section 2.3).
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    # It is global, and would apply what it was told of another model (the plan's) to parameters that have inherited
    # their addresses.
    manager.initialize()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
    # 16384 rather than the library's 4096, so that no norm of a usual width is quantised.
    optimizer = bitsandbytes.optim.AdamW8bit(groups, min_8bit_size=16384, is_paged=paged, **constants)
    optimizer.check_overrides()
    return cast(torch.optim.Optimizer, optimizer)


def _paged_adamw_8bit(model: nn.Module, groups: list[dict[str, Any]], **constants: Any) -> torch.optim.Optimizer:
    return _adamw_8bit(model, groups, paged=True, **constants)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "paged_adamw_8bit": _paged_adamw_8bit,
}

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
    """Say which states the optimizer keeps and in which dtype."""
    if config.optim == "adamw":
        # torch keeps the moments in the parameter's dtype.
        dtype = "bf16" if config.precision == "bf16-true" else "fp32"
        return f"{config.optim}, two moments per parameter in {dtype}"
    return f"{config.optim}, two moments per parameter in 8 bits (embeddings and small tensors: fp32)"


def allocate_states(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer make the states that it would make in its first step, where it has a way to, to be filled.

    bitsandbytes must, since it pages some of them and shares its code books. torch's have no such way, and need none.

    Args:
        optimizer: over parameters on their device.
    """
    if not hasattr(optimizer, "init_state"):
        return
    for group_number, group in enumerate(optimizer.param_groups):
        for number, parameter in enumerate(group["params"]):
            if not optimizer.state[parameter]:
                optimizer.init_state(group, parameter, group_number, number)


def reset_states(optimizer: torch.optim.Optimizer) -> None:
    """Bring the states to where they are before the first step.

    bitsandbytes' are set to zero in place, since it never frees its pages; others are dropped.

    Args:
        optimizer: perhaps with states.
    """
    if not hasattr(optimizer, "init_state"):
        optimizer.state.clear()
        return
    for state in optimizer.state.values():
        state["step"] = 0
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and not key.startswith("qmap"):  # the shared code books stay
                value.zero_()


def estimate_state_bytes(config: Config, model: nn.Module) -> int:
    """Estimate the bytes of the optimizer's states: two moments in the parameter's dtype, or in 8 bits."""
    if config.optim == "adamw":
        return sum(2 * parameter.numel() * parameter.element_size() for parameter in model.parameters())
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return sum((8 if id(parameter) in embeddings else 2) * parameter.numel() for parameter in model.parameters())


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


# ---------------------------------------------------------------------------------------------- gradient norm

# Elements squared at a time: bounds the fp64 copy. It belongs to the numerics: another size sums in another order.
_NORM_CHUNK = 1 << 20


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale all gradients so that their global norm is at most `max_norm`.

    Args:
        parameters: those without a gradient are passed over.
        max_norm: 0 only measures.

    Returns:
        The norm before scaling: a float64 scalar on the gradients' device (float32 on Apple's, which has no float64).
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    norm = global_norm([parameter.grad for parameter in with_gradient if parameter.grad is not None])
    if max_norm > 0:
        # torch's own scaling; no host sync: gradients within the limit are multiplied by exactly 1.
        nn.utils.clip_grads_with_norm_(with_gradient, max_norm, norm.float())
    return norm


def global_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Take the 2-norm over all gradients, summed per parameter in a fixed order in fp64.

    Args:
        gradients: any shapes and floating dtypes, on one device.
    """
    device = gradients[0].device
    wide = torch.float32 if device.type == "mps" else torch.float64
    squares = torch.stack([_squared_norm(gradient, wide) for gradient in gradients])
    return squares.sum().sqrt()


def _squared_norm(gradient: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    total = torch.zeros((), dtype=wide, device=gradient.device)
    for chunk in gradient.flatten().split(_NORM_CHUNK):
        values = chunk.to(wide)
        total += torch.dot(values, values)
    return total
