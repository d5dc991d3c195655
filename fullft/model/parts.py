"""The parts of a model: decoder, decoder layers, and counts of parameters and operations."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fullft.config.config import Config
from fullft.config.numerics import Format
from fullft.errors import ModelError
from fullft.model.extra_losses import describe_left_out

_MEANINGS = {
    "fp32": "weights, gradients and computation in fp32",
    "bf16-mixed": "weights and gradients in fp32, computation in bf16 under torch.autocast",
    "bf16-true": "weights, gradients and computation in bf16",
}


def count_parameters(model: nn.Module) -> int:
    """Count trainable parameters; tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def num_embeddings(model_config: PreTrainedConfig) -> int | None:
    """Return for how many token ids a model has embeddings; None where its config does not say."""
    count: int | None = getattr(model_config.get_text_config(decoder=True), "vocab_size", None)
    return count


def describe_model(config: Config, model: PreTrainedModel) -> str:
    """Say how many parameters are trained, where and in which precision, and warn of what that costs.

    Args:
        config: its number formats are named.
        model: on its device.
    """
    count = count_parameters(model)
    scale, letter = next(((s, n) for s, n in ((1e9, "B"), (1e6, "M"), (1e3, "K")) if count >= s), (1, ""))
    lines = [
        f"Total trainable parameters: {count:,} ({count / scale:.2f}{letter})",
        f"Precision: {config.precision} on {model.device}: {_MEANINGS[config.precision]}",
    ]
    if config.numerics.weights is Format.BF16 and config.numerics.masters == "none":
        lines.append(
            "warning: bf16 weights round away updates below 1/512 of a weight; --master_weights split keeps them"
        )
    if (
        model.device.type == "cuda"
        and config.numerics.computation is Format.BF16
        and not torch.cuda.is_bf16_supported(False)
    ):
        lines.append("warning: this GPU has no bf16 units and emulates them slowly: --precision fp32 may be faster")
    lines += describe_left_out(model.config)
    return "\n".join(lines)


def replace_parameters(model: nn.Module, others: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Put other parameters in the places of some, in every module that shares one.

    Args:
        model: changed in place.
        others: by the parameters that they replace.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(module, name, others.get(parameter, parameter))


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Find the stack of decoder layers, whatever the family calls it (`h`, `layers`, `blocks`, ...).

    Args:
        model: a causal language model.

    Raises:
        ModelError: no list of modules has as many entries as the config has layers.
    """
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    # In the decoder first: a model that also sees or hears has other stacks, perhaps of the same height.
    for part in (model.get_decoder(), model):
        for module in part.modules() if isinstance(part, nn.Module) else []:
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return module
    raise ModelError(
        f"no decoder layers were found in {type(model).__name__}: --activation_checkpointing none trains without them"
    )


class _ReachedError(Exception):
    """Carries the module that a model's forward has reached."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Find what comes before the head: the module that the model's own forward calls, with all that surrounds it.

    A family's `get_decoder` may name a part of that (Gemma-3's, which sees too), and `base_model` more (OPT's).

    Args:
        model: a causal language model.

    Raises:
        ModelError: it calls no module.
    """

    def reached(module: nn.Module, *_: Any) -> None:
        raise _ReachedError(module)

    # First in line, so that no other hook sees a call that does not take place.
    hooks = [
        module.register_forward_pre_hook(reached, prepend=True) for module in model.modules() if module is not model
    ]
    try:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    except _ReachedError as found:
        return found.module
    finally:
        for hook in hooks:
            hook.remove()
    raise ModelError(f"{type(model).__name__} has no decoder: it is no causal language model")


def flops_per_token(model: PreTrainedModel, mean_length: float) -> float:
    """Count the floating-point operations of forward and backward, per token, without recomputation.

    Args:
        model: every parameter but the input embeddings multiplies each token once.
        mean_length: tokens per sequence, for attention's share.

    Source: Chowdhery et al., "PaLM" (2022), appendix B: 6 N + 12 layers x width x length.
    """
    text = model.config.get_text_config(decoder=True)
    parameters = count_parameters(model)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        parameters -= embeddings.weight.numel()  # looked up, not multiplied; tied ones are the head's matrix
    attention = text.num_hidden_layers * text.hidden_size * mean_length
    return float(6 * parameters + 12 * attention)
