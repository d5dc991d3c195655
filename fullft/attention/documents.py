"""Attention within documents: each of those that are packed into a sequence attends to itself alone.

Owns that attention on CPUs, where torch's fused kernel takes a mask for what is packed, and works on all of it. Forward
has that kernel work on documents instead. Its backward would be slower than our products, which compute the
probabilities anew; queries, keys and values are kept for them, as much whatever the documents. Elsewhere, and wherever
it would not give what torch's gives, models keep what they have.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch._guards import detect_fake_mode as active_fake_mode
from torch.library import custom_op
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from fullft.attention.order import Gathered, Layout, Span, most_padded, padded

NAME = "documents"
_BLOCK_QUERIES = 192  # of a document: their probabilities stay in the cache, and keys behind them are left out
_GROUP_TOKENS = 1024  # of documents that are worked on at once: small operations cost by the call


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
    is_alike = query.shape[2:] == key.shape[2:] == value.shape[2:]  # unlike are cached keys, and values of other widths
    if attention_mask is None and is_alike and dropout == 0:
        attended: torch.Tensor = document_attention(query, key, value, scaling, position_ids)
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


_layout_of = lru_cache(maxsize=1)(Layout)  # all layers of a micro-batch have the same


def _layout(position_ids: torch.Tensor | None, query: torch.Tensor) -> Layout:
    """Lay out the documents that begin where positions are 0; on fake tensors, the largest that there may be."""
    batch, length = query.shape[0], query.shape[2]
    documents = [(length,)] * batch
    if position_ids is not None and active_fake_mode() is None:
        for row, positions in enumerate(position_ids.expand(batch, -1)):
            starts = [0, *(torch.nonzero(positions[1:] == 0)[:, 0] + 1).tolist(), length]
            documents[row] = tuple(end - start for start, end in zip(starts, starts[1:], strict=False))
    return _layout_of(tuple(documents), _BLOCK_QUERIES, _GROUP_TOKENS)


def _mask(position_ids: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor:
    """Make [batch or 1, 1, queries, keys], True where a query sees a key."""
    places = torch.arange(query.shape[2])
    seen = places[:, None] >= places
    if position_ids is None:
        return seen[None, None]
    starts = places - position_ids
    return (seen & (starts[:, :, None] == starts[:, None, :]))[:, None]


# ---------------------------------------------------------------------------------------------- the arithmetic


def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, position_ids: torch.Tensor | None
) -> torch.Tensor:
    """Attend, by torch's kernel for documents of about one length at a time."""
    by_group = _layout(position_ids, query).by_group
    queries, keys, values = (by_group.gather(each, key.shape[1]) for each in (query, key, value))
    for number, _ in _numbered(by_group.spans):
        its_queries, its_keys, its_values = (each.span(number) for each in (queries, keys, values))
        # The result has no name: it is gone before the next span's, and before all are restored, which takes more.
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
    """Give the gradients of queries, keys and values.

    Keys and values of fewer heads than the queries are not repeated: queries that share a head are rows of one product.
    """
    layout = _layout(position_ids, query)
    queries = layout.by_block.gather(query, key.shape[1])
    grad_outputs = layout.by_block.gather(grad_output, key.shape[1], zero_padding=True)  # so that no key gets any of it
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
    """Put gradients where what has been read for the last time was: the queries' in the place of the output's."""
    scratch = _Scratch(queries)
    for number, block in _numbered(blocks):
        its_queries, grad_output = queries.piece(number), grad_outputs.piece(number)
        its_keys, its_values = _seen(keys, block), _seen(values, block)
        probabilities = _probabilities(its_queries, its_keys, block, scaling, scratch)
        grad_scores = scratch.scores(1, probabilities.shape)
        torch.bmm(grad_output, its_values.transpose(1, 2), out=grad_scores)  # of probabilities, so far
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
    """Number the spans; on fake tensors one stands for all."""
    return enumerate(spans[:1] if active_fake_mode() is not None else spans)


def _seen(keys: Gathered, block: Span) -> torch.Tensor:
    """View those of keys or values that a block sees: [documents × key heads, keys, width]."""
    return keys.piece(block.group)[:, : block.end]


class _Scratch:
    """Memory that the blocks use one after the other: as much as any documents could take."""

    def __init__(self, gathered: Gathered) -> None:
        (batch, heads, length, width), key_heads, like = gathered.shape, gathered.key_heads, gathered.rows
        queries = min(_BLOCK_QUERIES, padded(length))
        keys = max(min(_GROUP_TOKENS, most_padded(batch * length)), padded(length))
        self._scores = like.new_empty(2, heads * queries * keys)
        self._gradient = like.new_empty(key_heads * keys * width)
        # In fp32 at least: the blocks of a document add up.
        wide = torch.promote_types(like.dtype, torch.float32)
        self._sums = like.new_empty(2, key_heads * keys * width, dtype=wide)
        self.bias = like.new_full((queries, queries), float("-inf")).triu_(1)

    def scores(self, number: int, shape: Sequence[int]) -> torch.Tensor:
        """View a piece for numbers of a block's queries and keys."""
        return self._scores[number, : math.prod(shape)].view(shape)

    def gradient(self, keys: Gathered, block: Span) -> torch.Tensor:
        """View where a block's gradient goes, of the keys or values that it sees: [documents × key heads, keys, width].

        That is where these are, if no other block needs them.
        """
        seen = _seen(keys, block)
        return seen if block.is_whole else self._gradient[: seen.numel()].view(seen.shape)

    def add(self, number: int, gradient: torch.Tensor, keys: Gathered, block: Span) -> None:
        """Add a block's gradient to those of its documents' other blocks, and the last one's sum take the keys' place.

        Args:
            number: of the sum.
            gradient: where `gradient` says.
            keys: or values, that it belongs to.
            block: those of a document come last ones first; the first to come sees all keys.
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
    """Give [documents × key heads, queries that share one, keys] of a block's queries and the keys that it sees."""
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
    """Take memory as `Gathered.restored` does: compiled graphs rely on it, and layers go on from it without a copy."""
    return torch.empty_like(vectors.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


# It is one operator, with another for its backward: a compiler would gain nothing within, and have other graphs for
# other documents; and selective checkpointing keeps what it gives.
document_attention = custom_op("fullft::attention", _forward, mutates_args=())
document_attention.register_fake(lambda query, *_: _like_result(query))
_backward_operator = custom_op("fullft::attention_backward", _backward, mutates_args=())
_backward_operator.register_fake(lambda _, query, key, value, *__: tuple(map(_like_result, (query, key, value))))
document_attention.register_autograd(_differentiate, setup_context=_keep)
# What the operators do: their scratch memory is a step's memory too.
BODIES: dict[Any, Callable[..., Any]] = {
    torch.ops.fullft.attention.default: _forward,
    torch.ops.fullft.attention_backward.default: _backward,
}
