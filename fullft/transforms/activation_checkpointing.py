"""Activation checkpointing: keep a decoder layer's input, or what its products give, and recompute in backward.

Owns which layers are wrapped, and how. One way for every family, by `torch.utils.checkpoint` alone. It must be applied
before the loop, which then knows nothing of it, and before compilation: the graph of a backward pass then recomputes no
more than it needs. The loss and the gradients stay bitwise the same; in graphs, up to rounding.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from fullft.config.config import Config, parse_offload
from fullft.errors import ModelError
from fullft.model.parts import decoder_layers

Forward = Callable[..., Any]

# Most of a layer's time, and half of what it would keep, or less. Not the products of batches of matrices: those are
# attention's, if it is no operator of its own, and its scores grow with the square of the sequence.
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::_grouped_mm", "transformers::grouped_mm_fallback")


def apply_activation_checkpointing(model: PreTrainedModel, config: Config) -> None:
    """Wrap decoder layers so that backward recomputes them.

    Where they share weights and are not compiled, `selective` is `full`.

    Args:
        model: changed in place.
        config: `activation_checkpointing`, `compile` and `offload` count: see `checkpointing_of`.

    Raises:
        ModelError: the model's decoder layers cannot be found.
    """
    mode = checkpointing_of(config)
    if mode == "none":
        return
    layers, every = decoder_layers(model), recomputed_every(mode)
    uses = Counter(id(parameter) for layer in layers for parameter in layer.parameters())
    # Autocast copies a weight that layers share once, and adds their gradients up there: the copy must be kept, and a
    # layer that finds it has fewer operators than its recomputation, which selective checkpointing takes amiss.
    shares = config.compile != "true" and max(uses.values(), default=0) > 1
    whole: Callable[[Forward], Forward] = functools.partial(recompute, autocast_keeps_copies=shares)
    cheap = whole if shares else recompute_but_products
    for number, layer in enumerate(layers):
        if every and number % every == 0:
            layer.forward = whole(layer.forward)
        elif mode == "selective" or config.compile == "true":
            layer.forward = cheap(layer.forward)


def checkpointing_of(config: Config) -> str:
    """Give what becomes of `activation_checkpointing`, where `auto`, undecided, is `none`.

    Streamed layers have none from here: they recompute by themselves, as a recomputation must fetch their weights
    again. In a graph it takes no time to recompute what is fused: there `none` is `selective`.

    Args:
        config: `activation_checkpointing`, `compile` and `offload` count.
    """
    if "parameters" in parse_offload(config.offload):
        return "none"
    if config.activation_checkpointing in ("none", "auto"):
        return "selective" if config.compile == "true" else "none"
    return config.activation_checkpointing


def recomputed_every(mode: str) -> int:
    """Give the n of every n-th layer that a mode recomputes whole: 1 for `full`, 0 where there is none."""
    return int(mode.removeprefix("every_")) if mode.startswith("every_") else int(mode == "full")


def recompute(forward: Forward, *, autocast_keeps_copies: bool = False, **options: Any) -> Forward:
    """Have backward call a layer again, and forward keep nothing but its inputs.

    Args:
        forward: of the layer.
        autocast_keeps_copies: of weights, until it ends; else those of all layers would wait for the loss.
        options: of `torch.utils.checkpoint.checkpoint`.
    """

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)  # nothing is kept for a backward that will not come
        with nullcontext() if autocast_keeps_copies else _autocast_keeps_no_copies():
            # The random state is preserved: dropout must draw the same mask twice, or gradients would be wrong.
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=True, **options, **kwargs)

    return wrapped


def recompute_but_products(forward: Forward) -> Forward:
    """Have backward call a layer again but for its matrix products and its attention, whose results are kept.

    Args:
        forward: of the layer. Called without a compiler, it raises `ModelError` if it overwrites such a result.
    """
    return recompute(forward, context_fn=lambda: create_selective_checkpoint_contexts(_Products().policy))


class _Products:
    """What one call of a layer keeps."""

    def __init__(self) -> None:
        self._kept: set[int] = set()  # storages, which live as long as the call's results are kept

    def policy(self, context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        """Decide about an operator that has run.

        Raises:
            ModelError: it overwrites what is kept. Torch does not notice where that is done to a view.
        """
        name = operator.name()
        # Attention that drops out draws: left out of recomputation, it would leave its numbers to what draws later.
        if name in _PRODUCTS or ("attention" in name and not _given(operator, args, kwargs).get("dropout_p")):
            if not torch.compiler.is_compiling():  # graphs have no operators in place
                self._kept.update(map(_storage, filter(torch.is_tensor, tree_leaves(context.op_output))))
            return CheckpointPolicy.MUST_SAVE
        if self._kept and _written(operator):
            written = filter(torch.is_tensor, map(_given(operator, args, kwargs).get, _written(operator)))
            if not self._kept.isdisjoint(map(_storage, written)):
                raise ModelError(
                    f"the model overwrites what its matrix products give ({name}), which selective checkpointing "
                    "keeps: pass --activation_checkpointing full, or none"
                )
        return CheckpointPolicy.PREFER_RECOMPUTE


def _given(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Name an operator's arguments; those of a higher-order one have no names."""
    schema = getattr(operator, "_schema", None)
    return dict(zip((each.name for each in schema.arguments), args, strict=False)) | kwargs if schema else kwargs


@functools.cache
def _written(operator: Any) -> list[str]:
    """Name the arguments that an operator overwrites."""
    schema = getattr(operator, "_schema", None)
    return [each.name for each in schema.arguments if each.is_write] if schema else []


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def _autocast_keeps_no_copies() -> Iterator[None]:
    """Have autocast copy a weight for one use, not until it ends."""
    was_enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was_enabled)
