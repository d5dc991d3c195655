"""Activation checkpointing: keep a decoder layer's input, or what its products give, and recompute in backward.

Owns which layers are wrapped, and how. One way for every family, by `torch.utils.checkpoint` alone. It must be applied
before the loop, which then knows nothing of it, and before compilation: the graph of a backward pass then recomputes no
more than it needs. The loss and the gradients stay bitwise the same; in graphs, up to rounding.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from fullft.config import Config, parse_offload
from fullft.model import decoder_layers

Forward = Callable[..., Any]

# Most of a layer's time, and much less than half of what it would keep. Not the products of batches of matrices: those
# are attention's, if it is no operator of its own, and its scores grow with the square of the sequence.
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::_grouped_mm")


def apply_activation_checkpointing(model: PreTrainedModel, config: Config) -> None:
    """Wrap decoder layers so that backward recomputes them.

    Args:
        model: changed in place.
        config: `activation_checkpointing` counts, where `auto`, undecided, is `none`; and `compile`, for in a graph
            `none` is `selective`, which costs no time there. Streamed layers recompute by themselves.

    Raises:
        ModelError: the model's decoder layers cannot be found.
    """
    mode = config.activation_checkpointing
    every = int(mode.removeprefix("every_")) if mode.startswith("every_") else int(mode == "full")
    is_selective = mode == "selective" or config.compile == "true"
    if not (every or is_selective) or "parameters" in parse_offload(config.offload):
        return
    for number, layer in enumerate(decoder_layers(model)):
        if every and number % every == 0:
            layer.forward = recompute(layer.forward)
        elif is_selective:
            layer.forward = recompute_cheap(layer.forward)


def recompute(forward: Forward, **options: Any) -> Forward:
    """Have backward call a layer again, and forward keep nothing but its inputs.

    Args:
        forward: of the layer.
        options: of `torch.utils.checkpoint.checkpoint`.
    """

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)  # nothing is kept for a backward that will not come
        with _autocast_keeps_no_copies():
            # The random state is preserved: dropout must draw the same mask twice, or gradients would be wrong.
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=True, **options, **kwargs)

    return wrapped


def recompute_cheap(forward: Forward) -> Forward:
    """Have backward call a layer again but for its matrix products and its attention, whose results are kept.

    Args:
        forward: of the layer.
    """
    return recompute(forward, context_fn=functools.partial(create_selective_checkpoint_contexts, _policy))


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.name()
    is_kept = name in _PRODUCTS or ("attention" in name and not _draws(operator, args, kwargs))
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def _draws(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether attention drops out: left out of recomputation, it would leave later ones to draw its numbers."""
    schema = getattr(operator, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema else []
    given = dict(zip(names, args, strict=False)) | kwargs
    return bool(given.get("dropout_p", 0) > 0)


@contextmanager
def _autocast_keeps_no_copies() -> Iterator[None]:
    """Have autocast copy a weight for one use, not until it ends: the copies of all layers would wait for the loss."""
    was_enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was_enabled)
