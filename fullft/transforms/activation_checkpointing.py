"""Activation checkpointing: keep a decoder layer's input, or the results of its products, and recompute in backward.

One way serves every family, by `torch.utils.checkpoint` alone. The loss and the gradients stay bitwise the same; in
compiled graphs, up to rounding. It must be applied before compilation, so that the graph of a backward pass recomputes
no more than it needs. Recomputation stops at the last tensor that backward asks for: `full` costs 24% more operations
on Mistral-7B, not 33%.
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

from fullft.config.config import Config
from fullft.config.recomputation import Recomputation
from fullft.errors import ModelError
from fullft.model.parts import decoder_layers

Forward = Callable[..., Any]

# Most of a layer's time, and at most half of what it would keep. Batched products are left out: they are attention's,
# where it is no operator of its own, and its scores grow with the square of the sequence.
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::_grouped_mm", "transformers::grouped_mm_fallback")


def apply_activation_checkpointing(model: PreTrainedModel, config: Config) -> None:
    """Wrap decoder layers so that backward recomputes them.

    Where layers share weights and are not compiled, `selective` is `full`.

    Args:
        model: changed in place.
        config: see `recomputation_of`.

    Raises:
        ModelError: the model's decoder layers cannot be found.
    """
    recomputation = recomputation_of(config)
    if not recomputation.is_any:
        return
    layers, every = decoder_layers(model), recomputation.every
    uses = Counter(id(parameter) for layer in layers for parameter in layer.parameters())
    # Autocast copies a weight that layers share once, and adds their gradients up there, so the copy must be kept. A
    # layer that finds it runs fewer operators than its recomputation, which selective checkpointing does not allow.
    shares = not config.compiles and max(uses.values(), default=0) > 1
    whole: Callable[[Forward], Forward] = functools.partial(recompute, autocast_keeps_copies=shares)
    cheap = whole if shares else recompute_but_products
    for number, layer in enumerate(layers):
        if every and number % every == 0:
            layer.forward = whole(layer.forward)
        elif recomputation.selective or config.compiles:
            layer.forward = cheap(layer.forward)


def recomputation_of(config: Config) -> Recomputation:
    """Return what is recomputed by wrapping layers here.

    Streamed layers are not wrapped: they recompute by themselves, since a recomputation must fetch their weights again.
    In a graph it takes no time to recompute what is fused, so compiled layers are at least `selective`.

    Args:
        config: its recomputation, placement and compilation are read.
    """
    if config.placement.streams_layers:
        return Recomputation()
    if config.compiles and not config.recomputation.is_any:
        return Recomputation(selective=True)
    return config.recomputation


def recompute(forward: Forward, *, autocast_keeps_copies: bool = False, **options: Any) -> Forward:
    """Make forward keep nothing but a layer's inputs, and backward call the layer again.

    Args:
        forward: the layer's.
        autocast_keeps_copies: whether autocast keeps its copies of weights until it ends. All layers' copies would then
            still be there at the loss: 2 bytes per parameter, for nothing.
        options: for `torch.utils.checkpoint.checkpoint`.
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
    """Keep the results of a layer's matrix products and its attention, and make backward recompute the rest.

    Args:
        forward: the layer's. Called without a compiler, it raises `ModelError` if it overwrites such a result.
    """
    return recompute(forward, context_fn=lambda: create_selective_checkpoint_contexts(_Products().policy))


class _Products:
    """The results that one call of a layer keeps."""

    def __init__(self) -> None:
        self._kept: set[int] = set()  # ids of storages, which live as long as the results are kept

    def policy(self, context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        """Decide about an operator that has run.

        Raises:
            ModelError: it overwrites what is kept. torch does not notice that where it is done to a view, as OLMo does
                when it clips its queries.
        """
        name = operator.name()
        # Attention with dropout draws random numbers. Were it not recomputed, a later operator would draw them.
        if name in _PRODUCTS or ("attention" in name and not _given(operator, args, kwargs).get("dropout_p")):
            if not torch.compiler.is_compiling():  # graphs have no operators in place
                self._kept.update(map(_storage, tensors_in(context.op_output)))
            return CheckpointPolicy.MUST_SAVE
        if self._kept and _written(operator):
            written = filter(torch.is_tensor, map(_given(operator, args, kwargs).get, _written(operator)))
            if not self._kept.isdisjoint(map(_storage, written)):
                raise ModelError(
                    f"the model overwrites what its matrix products give ({name}), which selective checkpointing "
                    "keeps: pass --activation_checkpointing full, or none"
                )
        return CheckpointPolicy.PREFER_RECOMPUTE


def tensors_in(result: object) -> Iterator[torch.Tensor]:
    """Yield the tensors in what an operator returns."""
    return filter(torch.is_tensor, tree_leaves(result))


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
    """Make autocast drop its copy of a weight after one use."""
    was_enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was_enabled)
