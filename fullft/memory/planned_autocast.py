"""Autocast as a card has it, in a plan whose fake tensors are on the CPU.

Products run in bf16 on both. But there are operators that run in fp32 on CUDA and as their inputs are on a CPU, such as
the powers in GPT-2's activation: what backward keeps of them takes twice the memory.

Source: pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast to float32", those of them that decoders use.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from fullft.model.parts import decoder_layers

_WIDENED = {
    *("__pow__", "__rpow__", "pow", "exp", "expm1", "log", "log10", "log1p", "log2", "reciprocal", "rsqrt"),
    *("softplus", "layer_norm", "group_norm", "logsumexp"),
}
# They read their input as it is, and make fp32 of it themselves.
_WIDE_RESULTS = {"softmax", "log_softmax", "cumsum", "cumprod", "prod", "sum"}


def autocast_as_cuda(model: PreTrainedModel) -> None:
    """Make decoder layers under the CPU's autocast run those operators in fp32 that CUDA's does.

    It must be applied before activation checkpointing, so that a recomputation does the same.

    Args:
        model: changed in place.
    """
    for layer in decoder_layers(model):
        layer.forward = _autocast_as_cuda(layer.forward)


def _autocast_as_cuda(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _Widening():
            return forward(*args, **kwargs)

    return wrapped


class _Widening(TorchFunctionMode):
    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if not torch.is_autocast_enabled("cpu"):
            return function(*args, **kwargs)
        if name in _WIDENED:
            args = tuple(map(_wide, args))
            kwargs = {key: _wide(value) for key, value in kwargs.items()}
        elif name in _WIDE_RESULTS and kwargs.get("dtype") is None and any(map(_is_narrow, args)):
            kwargs = {**kwargs, "dtype": torch.float32}
        return function(*args, **kwargs)


def _is_narrow(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def _wide(value: Any) -> Any:
    return value.float() if _is_narrow(value) else value
