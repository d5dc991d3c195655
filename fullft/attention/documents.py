"""Attention within documents, on a CPU: each document that is packed into a sequence attends to itself alone.

How it works: forward calls torch's fused kernel for documents of about one length at a time. Backward computes the
probabilities again, block by block, and takes products by hand. Queries, keys and values are kept for it, as many bytes
for any documents.

It replaces torch's kernel with a mask, which on a CPU works on all of a packed sequence, whatever the mask hides.
torch's backward for documents takes 17 ms where this one takes 10. The price is this file and `order.py`;
docs/internals/cpu.md has the measurements.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch.library import custom_op
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from fullft.attention.interface import attention_by, whole_sequences_need_none
from fullft.attention.order import Gathered, Layout, Span, most_padded, padded
from fullft.attention.positions import lengths_of
from fullft.tracing import standing_for_all

NAME = "documents"
_BLOCK_QUERIES = 192  # of a document: their probabilities stay in the cache, and later keys are left out
_GROUP_TOKENS = 1024  # of documents that are computed together: small operations cost by the call


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    position_ids: torch.Tensor | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attend as `interface.attention_by` asks; no window and no soft cap comes here."""
    attended: torch.Tensor = document_attention(query, key, value, scaling, position_ids)
    return attended


AttentionInterface.register(NAME, attention_by(_attend))
AttentionMaskInterface.register(NAME, whole_sequences_need_none)


_layout_of = lru_cache(maxsize=1)(Layout)  # all layers of a micro-batch share one


def _layout(position_ids: torch.Tensor | None, query: torch.Tensor) -> Layout:
    """Lay out the documents that begin where positions are 0."""
    batch, length = query.shape[0], query.shape[2]
    documents: list[list[int]] = [[] for _ in range(batch)]
    lengths = lengths_of(position_ids, batch, length)
    for tokens, end in zip(lengths, accumulate(lengths), strict=True):
        documents[(end - 1) // length].append(tokens)
    return _layout_of(tuple(map(tuple, documents)), _BLOCK_QUERIES, _GROUP_TOKENS)


# ---------------------------------------------------------------------------------------------- the arithmetic


def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, position_ids: torch.Tensor | None
) -> torch.Tensor:
    """Attend, by torch's kernel for documents of about one length at a time."""
    by_group = _layout(position_ids, query).by_group
    queries, keys, values = (by_group.gather(each, key.shape[1]) for each in (query, key, value))
    for number, _ in _numbered(by_group.spans):
        its_queries, its_keys, its_values = (each.span(number) for each in (queries, keys, values))
        # The result has no name, so that it is freed before the next span and before all are restored.
        its_queries.copy_(
            scaled_dot_product_attention(
                its_queries, its_keys, its_values, is_causal=True, scale=scaling, enable_gqa=True
            )
        )
    return queries.restored()


def _backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position_ids: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of queries, keys and values.

    Keys and values of fewer heads than the queries are not repeated: queries that share a head are rows of one product.
    """
    layout = _layout(position_ids, query)
    queries = layout.by_block.gather(query, key.shape[1])
    grad_outputs = layout.by_block.gather(
        grad_output, key.shape[1], zero_padding=True
    )  # so that no key gets a gradient from it
    keys, values = (layout.by_group.gather(each, key.shape[1]) for each in (key, value))
    _differentiate_in_place(layout.by_block.spans, grad_outputs, queries, keys, values, scaling)
    return grad_outputs.restored(), keys.restored(), values.restored()


def _differentiate_in_place(
    blocks: Sequence[Span],
    grad_outputs: Gathered,
    queries: Gathered,
    keys: Gathered,
    values: Gathered,
    scaling: float,
) -> None:
    """Write each gradient into a buffer that is no longer needed: the queries' into the output's."""
    scratch = _Scratch(queries)
    for number, block in _numbered(blocks):
        its_queries, grad_output = queries.piece(number), grad_outputs.piece(number)
        its_keys, its_values = _seen(keys, block), _seen(values, block)
        probabilities = _probabilities(its_queries, its_keys, block, scaling, scratch)
        grad_scores = scratch.scores(1, probabilities.shape)
        torch.bmm(grad_output, its_values.transpose(1, 2), out=grad_scores)  # so far the gradient of the probabilities
        # The values have been read, ...
        grad_values = scratch.gradient(values, block)
        torch.bmm(probabilities.transpose(1, 2), grad_output, out=grad_values)
        scratch.add(0, grad_values, values, block)
        torch._softmax_backward_data(grad_scores, probabilities, -1, grad_scores.dtype, grad_input=grad_scores)
        # ... then the gradient of the output, ...
        torch.baddbmm(grad_output, grad_scores, its_keys, beta=0, alpha=scaling, out=grad_output)
        # ... then the keys.
        grad_keys = scratch.gradient(keys, block)
        torch.baddbmm(grad_keys, grad_scores.transpose(1, 2), its_queries, beta=0, alpha=scaling, out=grad_keys)
        scratch.add(1, grad_keys, keys, block)


def _numbered(spans: Sequence[Span]) -> Iterator[tuple[int, Span]]:
    return enumerate(standing_for_all(spans))


def _seen(keys: Gathered, block: Span) -> torch.Tensor:
    """View the keys or values that a block sees: [documents × key heads, keys, width]."""
    return keys.piece(block.group)[:, : block.end]


class _Scratch:
    """Memory that blocks use one after the other: as much as any documents could need."""

    def __init__(self, gathered: Gathered) -> None:
        (batch, heads, length, width), key_heads, like = gathered.shape, gathered.key_heads, gathered.rows
        queries = min(_BLOCK_QUERIES, padded(length))
        keys = max(min(_GROUP_TOKENS, most_padded(batch * length)), padded(length))
        self._scores = like.new_empty(2, heads * queries * keys)
        self._gradient = like.new_empty(key_heads * keys * width)
        # In fp32 at least, since the blocks of a document add up.
        wide = torch.promote_types(like.dtype, torch.float32)
        self._sums = like.new_empty(2, key_heads * keys * width, dtype=wide)
        self.bias = like.new_full((queries, queries), float("-inf")).triu_(1)

    def scores(self, number: int, shape: Sequence[int]) -> torch.Tensor:
        """View memory for one number per query and key of a block."""
        return self._scores[number, : math.prod(shape)].view(shape)

    def gradient(self, keys: Gathered, block: Span) -> torch.Tensor:
        """View the memory for a block's gradient of its keys or values: [documents × key heads, keys, width].

        It is the memory of these themselves, if no other block needs them.
        """
        seen = _seen(keys, block)
        return seen if block.is_whole else self._gradient[: seen.numel()].view(seen.shape)

    def add(self, number: int, gradient: torch.Tensor, keys: Gathered, block: Span) -> None:
        """Add a block's gradient to those of its documents' other blocks. The last sum replaces the keys.

        Args:
            number: of the sum: 0 or 1.
            gradient: in the memory that `gradient` returns.
            keys: the keys or values that it belongs to.
            block: blocks of a document come last ones first; the first to come sees all keys.
        """
        if block.is_whole:
            return
        total = keys.piece(block.group)
        sums = self._sums[number, : total.numel()].view(total.shape)
        if block.end == block.length:
            sums.copy_(gradient)
        else:
            sums[:, : block.end].add_(gradient)
        if block.first == 0:
            total.copy_(sums)


def _probabilities(
    queries: torch.Tensor, keys: torch.Tensor, block: Span, scaling: float, scratch: _Scratch
) -> torch.Tensor:
    """Return [documents × key heads, queries that share one, keys] for a block and the keys that it sees."""
    scores = scratch.scores(0, (*queries.shape[:2], block.end))
    torch.baddbmm(scores, queries, keys.transpose(1, 2), beta=0, alpha=scaling, out=scores)
    behind = scores.view(-1, block.size, block.end)[:, :, block.first :]
    behind.add_(scratch.bias[: block.size, : block.size])  # a key behind a query is hidden from it
    return torch.softmax(scores, -1, out=scores)  # in place: a row is read before it is written


# ---------------------------------------------------------------------------------------------- the operators


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    query, key, value, ctx.scaling, position_ids = inputs
    ctx.save_for_backward(query, key, value, position_ids)


def _differentiate(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *_backward_operator(gradient, *ctx.saved_tensors, ctx.scaling), None, None


def _like_result(vectors: torch.Tensor) -> torch.Tensor:
    """Allocate as `Gathered.restored` does: compiled graphs rely on it, and layers continue without a copy."""
    return torch.empty_like(vectors.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


# One operator, with another for its backward. A compiler would gain nothing inside, and would make other graphs for
# other documents. Selective checkpointing keeps the operator's result.
document_attention = custom_op("fullft::attention", _forward, mutates_args=())
document_attention.register_fake(lambda query, *_: _like_result(query))
_backward_operator = custom_op("fullft::attention_backward", _backward, mutates_args=())
_backward_operator.register_fake(lambda _, query, key, value, *__: tuple(map(_like_result, (query, key, value))))
document_attention.register_autograd(_differentiate, setup_context=_keep)
# What the operators run, for the memory tracker: their scratch memory is a step's memory too.
BODIES: dict[Any, Callable[..., Any]] = {
    torch.ops.fullft.attention.default: _forward,
    torch.ops.fullft.attention_backward.default: _backward,
}
