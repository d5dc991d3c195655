"""Activation checkpointing: keep a decoder layer's input, recompute the rest in backward.

Owns which layers are wrapped, and how. One way for every family, by `torch.utils.checkpoint` alone. It must be applied
before the loop, which then knows nothing of it; the loss and the gradients stay bitwise the same.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from fullft.model import decoder_layers


def apply_activation_checkpointing(model: PreTrainedModel, mode: str) -> None:
    """Wrap decoder layers so that backward recomputes them.

    Args:
        model: changed in place.
        mode: `none`, `full` (every layer) or `every_<n>` (layers 0, n, 2n, ...); `auto`, undecided, is `none`.

    Raises:
        ModelError: the model's decoder layers cannot be found.
    """
    if mode in ("none", "auto"):
        return
    every = 1 if mode == "full" else int(mode.removeprefix("every_"))
    for layer in decoder_layers(model)[::every]:
        layer.forward = _recomputed(layer.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)  # nothing is kept for a backward that will not come
        # The random state is preserved: dropout must draw the same mask twice, or gradients would silently be wrong.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=True, **kwargs)

    return wrapped
