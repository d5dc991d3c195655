"""Attention within documents: each of those that are packed into a sequence attends to itself alone.

Owns that attention on CPUs, where torch's fused kernel takes a mask for what is packed, and works on all of it: on
short documents ours takes a fifth of the time. Forward keeps queries, keys and values, and backward computes the
probabilities anew, so that what is kept does not depend on the documents. Elsewhere, and wherever it would not give
what torch's gives, models keep what they have.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch._guards import detect_fake_mode as active_fake_mode
from torch.library import custom_op
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

NAME = "documents"
_QUERIES = 192  # that a block has: their probabilities stay in the cache, and keys behind them are left out

# A row of the batch, a stretch of its queries, the keys that some of them see, and the document that they are of, in
# positions of the sequence.
Block = tuple[int, slice, slice, slice]


def apply_document_attention(model: PreTrainedModel) -> bool:
    """Let a model attend document by document, as told by positions that restart at 0.

    Args:
        model: changed in place, if it attends by torch's kernel on a CPU.

    Returns:
        Whether it is changed.
    """
    is_sdpa, is_on_cpu = model.config._attn_implementation == "sdpa", model.device.type == "cpu"
    if not (is_sdpa and is_on_cpu and model._supports_attention_backend):
        return False
    model.set_attn_implementation(NAME)
    return True


def revert_document_attention(model: PreTrainedModel) -> None:
    """Let it attend as before.

    Args:
        model: changed in place.
    """
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation("sdpa")


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers asks for it.

    Args:
        module: the attention layer.
        query: [batch, heads, queries, width].
        key: [batch, key heads, keys, width].
        value: as the keys.
        attention_mask: given where keys are cached, or sequences are longer than a window; else None.
        scaling: of the scores; None for 1 / sqrt(width).
        dropout: of the probabilities.
        position_ids: [1 or batch, sequence].

    Returns:
        [batch, queries, heads, width], and no probabilities.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.is_autocast_enabled(query.device.type):  # as it treats torch's own kernel
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if attention_mask is None and query.shape[2] == key.shape[2] and dropout == 0:
        if torch.compiler.is_compiling():
            attended: torch.Tensor = _opaque_attention(query, key, value, scaling, position_ids)
        else:
            attended = _Attention.apply(query, key, value, scaling, position_ids)  # type: ignore[no-untyped-call]
        return attended.transpose(1, 2), None
    if attention_mask is None and query.shape[2] == key.shape[2]:
        attention_mask = _mask(position_ids, query)
    attended = scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    return attended.transpose(1, 2), None


def _whole_sequences_need_none(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Make the mask of a step of generation, or of what is longer than a window; positions tell the rest."""
    # Some families (Qwen2-MoE, Phi-MoE, Llama-4's chunks) say what a token sees in the mask alone.
    fits = kwargs["q_length"] <= (kwargs.get("local_size") or kwargs["q_length"])
    if kwargs["q_length"] == kwargs["kv_length"] and kwargs.get("attention_mask") is None and fits:
        return None
    mask: torch.Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _whole_sequences_need_none)


def _documents(position_ids: torch.Tensor | None, query: torch.Tensor) -> list[list[int]]:
    """Give the lengths of the documents of each sequence; on fake tensors, of the largest that there may be."""
    batch, length = query.shape[0], query.shape[2]
    if position_ids is None or active_fake_mode() is not None:
        return [[length]] * batch
    found = []
    for row in position_ids.expand(batch, -1):
        starts = [0, *(torch.nonzero(row[1:] == 0)[:, 0] + 1).tolist(), length]
        found.append([end - start for start, end in zip(starts, starts[1:], strict=False)])
    return found


def _mask(position_ids: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor:
    """Make [batch or 1, 1, queries, keys], True where a query sees a key."""
    places = torch.arange(query.shape[2])
    seen = places[:, None] >= places
    if position_ids is None:
        return seen[None, None]
    starts = places - position_ids
    return (seen & (starts[:, :, None] == starts[:, None, :]))[:, None]


# ---------------------------------------------------------------------------------------------- the arithmetic


class _Attention(torch.autograd.Function):
    """Softmax attention, block by block."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        position_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        _keep(ctx, (query, key, value, scaling, position_ids), None)
        return _forward(query, key, value, scaling, position_ids)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: D102
        query, key, value, position_ids = ctx.saved_tensors
        return *_backward(gradient, query, key, value, position_ids, ctx.scaling), None, None


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    query, key, value, ctx.scaling, position_ids = inputs
    ctx.save_for_backward(query, key, value, position_ids)


def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, position_ids: torch.Tensor | None
) -> torch.Tensor:
    """Attend.

    Keys and values of fewer heads than the queries are not repeated: queries that share a head are rows of one product.
    """
    attended = _like_output(query)
    scratch = _Scratch(query, key, scores=2, queries=2)
    for row, queries, keys, _ in _blocks(_documents(position_ids, query)):
        ours = scratch.gather(0, query[row, :, queries])
        probabilities = _probabilities(ours, key[row, :, keys], queries, keys, scaling, scratch)
        product = torch.bmm(probabilities, value[row, :, keys], out=scratch.queries(1, ours.shape))
        attended[row, :, queries] = product.view(attended[row, :, queries].shape)
    return attended


def _like_output(query: torch.Tensor) -> torch.Tensor:
    """Take memory for what is attended to: as [batch, sequence, heads, width] it goes on without a copy."""
    return torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position_ids: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give the gradients of queries, keys and values."""
    of_query, of_key, of_value = (torch.empty_like(each) for each in (query, key, value))
    scratch = _Scratch(query, key, scores=4, queries=3, keys=1, sums=2)
    # The last block of a document sees all its keys: their sums begin with it, and are complete with the first.
    for row, queries, keys, document in _blocks(_documents(position_ids, query)):
        ours, above = scratch.gather(0, query[row, :, queries]), scratch.gather(1, gradient[row, :, queries])
        its_keys, its_values = key[row, :, keys], value[row, :, keys]
        probabilities = _probabilities(ours, its_keys, queries, keys, scaling, scratch)
        product = torch.bmm(probabilities.transpose(1, 2), above, out=scratch.keys(0, its_values.shape))
        scratch.add(0, product, of_value[row, :, document], queries, document)
        of_probabilities = scratch.scores(2, probabilities.shape)
        torch.bmm(above, its_values.transpose(1, 2), out=of_probabilities)
        of_scores = scratch.scores(3, probabilities.shape)
        torch._softmax_backward_data(of_probabilities, probabilities, -1, query.dtype, grad_input=of_scores)
        product = torch.bmm(of_scores, its_keys, out=scratch.queries(2, ours.shape)).mul_(scaling)
        of_query[row, :, queries] = product.view(of_query[row, :, queries].shape)
        product = torch.bmm(of_scores.transpose(1, 2), ours, out=scratch.keys(0, its_keys.shape)).mul_(scaling)
        scratch.add(1, product, of_key[row, :, document], queries, document)
    return of_query, of_key, of_value


# In a compiled graph it is one operation, with another for its backward: a compiler gains nothing within, and documents
# of other lengths would be other graphs.
_opaque_attention = custom_op("fullft::attention", _forward, mutates_args=())
_opaque_backward = custom_op("fullft::attention_backward", _backward, mutates_args=())
_opaque_attention.register_fake(lambda query, *_: _like_output(query))
_opaque_backward.register_fake(lambda _, query, key, value, *__: tuple(map(torch.empty_like, (query, key, value))))
_opaque_attention.register_autograd(
    lambda ctx, gradient: (*_opaque_backward(gradient, *ctx.saved_tensors, ctx.scaling), None, None),
    setup_context=_keep,
)


def _blocks(documents: list[list[int]]) -> Iterator[Block]:
    """Cut each sequence's documents into blocks of queries, last ones first; on fake tensors one stands for all."""
    for row, lengths in enumerate(documents):
        start = 0
        for length in lengths:
            document = slice(start, start + length)
            for first in reversed(range(start, document.stop, _QUERIES)):
                end = min(first + _QUERIES, document.stop)
                yield row, slice(first, end), slice(start, end), document
                if active_fake_mode() is not None:
                    return
            start += length


class _Scratch:
    """Memory that the blocks use one after the other: as much as the largest that there could be would take."""

    def __init__(
        self, query: torch.Tensor, key: torch.Tensor, *, scores: int, queries: int, keys: int = 0, sums: int = 0
    ) -> None:
        self._heads = key.shape[1]
        _, heads, length, width = query.shape
        count = min(_QUERIES, length)
        self._scores = query.new_empty(scores, heads * count * length)
        self._queries = query.new_empty(queries, heads * count * width)
        self._keys = query.new_empty(keys, self._heads * length * width)
        # In fp32 at least: the blocks of a document add up.
        wide = torch.promote_types(key.dtype, torch.float32)
        self._sums = query.new_empty(sums, self._heads * length * width, dtype=wide)
        self._bias = query.new_full((count, count), float("-inf")).triu_(1)

    def scores(self, number: int, shape: Sequence[int]) -> torch.Tensor:
        """View a piece for numbers of a block's queries and keys."""
        return self._scores[number, : math.prod(shape)].view(shape)

    def queries(self, number: int, shape: Sequence[int]) -> torch.Tensor:
        """View a piece for vectors of a block's queries."""
        return self._queries[number, : math.prod(shape)].view(shape)

    def keys(self, number: int, shape: Sequence[int]) -> torch.Tensor:
        """View a piece for vectors of a block's keys."""
        return self._keys[number, : math.prod(shape)].view(shape)

    def hide(self, scores: torch.Tensor, queries: slice, keys: slice) -> None:
        """Hide from each query the keys behind it."""
        count, seen = queries.stop - queries.start, keys.stop - keys.start
        scores.view(-1, count, seen)[:, :, seen - count :].add_(self._bias[:count, :count])

    def add(self, number: int, product: torch.Tensor, total: torch.Tensor, queries: slice, document: slice) -> None:
        """Add what a block of a document brings [heads, keys, width] to the sums of all, then turn them into the total.

        Args:
            number: of the sums.
            product: for the keys that the block sees.
            total: [heads, keys of the document, width], written when the last of its blocks has come: that of its
                first queries.
            queries: of the block.
            document: that it belongs to.
        """
        is_first, is_last = queries.stop == document.stop, queries.start == document.start
        if is_first and is_last:
            total.copy_(product)
            return
        sums = self._sums[number, : total.numel()].view(total.shape)
        sums.copy_(product) if is_first else sums[:, : product.shape[1]].add_(product)
        if is_last:
            total.copy_(sums)

    def gather(self, number: int, vectors: torch.Tensor) -> torch.Tensor:
        """Turn [heads, queries, width] into [heads of keys, queries that share it, width]."""
        ours = self.queries(number, vectors.shape).copy_(vectors)
        return ours.view(self._heads, -1, vectors.shape[-1])


def _probabilities(
    ours: torch.Tensor,
    its_keys: torch.Tensor,
    queries: slice,
    keys: slice,
    scaling: float,
    scratch: _Scratch,
) -> torch.Tensor:
    """Give [heads of keys, queries that share it, keys] of queries and keys at these positions."""
    scores = scratch.scores(0, (*ours.shape[:2], its_keys.shape[1]))
    torch.baddbmm(scores, ours, its_keys.transpose(1, 2), beta=0, alpha=scaling, out=scores)
    scratch.hide(scores, queries, keys)
    return torch.softmax(scores, -1, out=scratch.scores(1, scores.shape))
