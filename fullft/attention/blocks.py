"""Attention within documents in plain torch, by blocks of queries: for dtypes and heads that no fused kernel takes.

A block sees the keys from its first token's document on, so that scores take memory for one block at a time, and time
grows with the tokens, not with their square. A block may hold several documents, or the end of one and the start of
another: a mask of the block's size keeps them apart.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from fullft.data.micro_batch import Documents
from fullft.tracing import standing_for_all

_SCORES = 1 << 25  # of a block: 128 MiB in fp32
_FEWEST, _MOST = 16, 256  # queries of a block


class Scores(NamedTuple):
    """How scores are made of products.

    Attributes:
        scaling: factor of the products.
        window: a token sees so many, itself included; None for all before it in its document.
        softcap: scores beyond it are bent towards it, by tanh; None for none.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None


class _Block(NamedTuple):
    """Some queries that follow each other, and the keys that the first of them and all others may see.

    Attributes:
        first: query.
        low: the first key.
        end: behind the last query, and the last key.
    """

    first: int
    low: int
    end: int


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, scores: Scores
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend, as `kernels.Kernel.forward` says."""
    key_heads, wide = key.shape[1], torch.promote_types(query.dtype, torch.float32)
    result = torch.empty_like(query, memory_format=torch.contiguous_format)
    logsumexp = query.new_empty(query.shape[1], query.shape[0], dtype=wide)
    starts = _starts(documents)
    for block in _blocks(documents, query.shape[1], scores.window):
        seen, _ = _scores(query, key, starts, block, scores)
        sums = torch.logsumexp(seen, -1)
        logsumexp[:, block.first : block.end] = sums.flatten(0, 1)
        probabilities = seen.sub_(sums[..., None]).exp_().to(query.dtype)
        attended = torch.matmul(probabilities.flatten(1, 2), _heads(value[block.low : block.end]))
        result[block.first : block.end] = _tokens(attended, key_heads, block)
    return result, logsumexp


def backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    result: torch.Tensor,
    logsumexp: torch.Tensor,
    documents: Documents,
    scores: Scores,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of queries, keys and values, as `kernels.Kernel.backward` says."""
    key_heads, dtype, wide = key.shape[1], query.dtype, logsumexp.dtype
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    # In fp32 at least, since blocks add up.
    grad_key, grad_value = (
        torch.zeros_like(each, dtype=wide, memory_format=torch.contiguous_format) for each in (key, value)
    )
    starts = _starts(documents)
    for block in _blocks(documents, query.shape[1], scores.window):
        seen, slope = _scores(query, key, starts, block, scores)
        sums = logsumexp[:, block.first : block.end].view(*seen.shape[:-1])
        probabilities = seen.sub_(sums[..., None]).exp_()
        above = _grouped(gradient, key_heads, block)
        inner = (above.to(wide) * _grouped(result, key_heads, block).to(wide)).sum(-1)
        of_queries, of_keys = slice(block.first, block.end), slice(block.low, block.end)
        grad_value[of_keys] += _heads(torch.matmul(probabilities.to(dtype).flatten(1, 2).mT, above.flatten(1, 2)))
        grad_scores = torch.matmul(above.flatten(1, 2), _heads(value[of_keys]).mT).view(seen.shape).to(wide)
        grad_scores = grad_scores.sub_(inner[..., None]).mul_(probabilities).mul_(scores.scaling)
        if slope is not None:
            grad_scores.mul_(slope)
        grad_products = grad_scores.to(dtype).flatten(1, 2)
        grad_query[of_queries] = _tokens(torch.matmul(grad_products, _heads(key[of_keys])), key_heads, block)
        grad_key[of_keys] += _heads(torch.matmul(grad_products.mT, _grouped(query, key_heads, block).flatten(1, 2)))
    return grad_query, grad_key.to(dtype), grad_value.to(dtype)


def _blocks(documents: Documents, heads: int, window: int | None) -> Sequence[_Block]:
    """Cut all tokens into blocks; the last one, which sees the most keys of a single document, comes first."""
    size = max(_FEWEST, min(_MOST, _SCORES // (heads * documents.longest)))
    return standing_for_all(list(_cut(documents, size, window)))


def _cut(documents: Documents, size: int, window: int | None) -> Iterator[_Block]:
    bounds = [0, *accumulate(documents.lengths)]
    for first in reversed(range(0, bounds[-1], size)):
        low = bounds[bisect_right(bounds, first) - 1]
        if window is not None:
            low = max(low, first - window + 1)
        yield _Block(first, low, min(first + size, bounds[-1]))


def _starts(documents: Documents) -> torch.Tensor:
    """Return [tokens]: where each token's document begins."""
    bounds = documents.bounds
    places = torch.arange(documents.num_tokens, dtype=bounds.dtype, device=bounds.device)
    starts: torch.Tensor = bounds[torch.searchsorted(bounds, places, right=True) - 1]
    return starts


def _scores(
    query: torch.Tensor, key: torch.Tensor, starts: torch.Tensor, block: _Block, scores: Scores
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return [key heads, heads that share one, queries, keys], -inf where a key is hidden, and the soft cap's slope."""
    queries = _grouped(query, key.shape[1], block)
    products = torch.matmul(queries.flatten(1, 2), _heads(key[block.low : block.end]).mT)
    wide = torch.promote_types(query.dtype, torch.float32)
    seen = products.view(*queries.shape[:-1], -1).to(wide).mul_(scores.scaling)
    slope = None
    if scores.softcap is not None:
        bent = seen.div_(scores.softcap).tanh_()
        slope = 1 - bent.square()
        seen = bent.mul_(scores.softcap)
    places = torch.arange(block.low, block.end, device=query.device)
    own = places[block.first - block.low :, None]
    hidden = (places > own) | (places < starts[block.first : block.end, None])
    if scores.window is not None:
        hidden |= places <= own - scores.window
    return seen.masked_fill_(hidden, float("-inf")), slope


def _heads(vectors: torch.Tensor) -> torch.Tensor:
    """View [tokens, key heads, width] as [key heads, tokens, width], or the other way round."""
    return vectors.transpose(0, 1)


def _grouped(vectors: torch.Tensor, key_heads: int, block: _Block) -> torch.Tensor:
    """Return a block's vectors as [key heads, heads that share one, queries, width]."""
    own = vectors[block.first : block.end]
    return own.view(len(own), key_heads, -1, own.shape[2]).permute(1, 2, 0, 3)


def _tokens(grouped: torch.Tensor, key_heads: int, block: _Block) -> torch.Tensor:
    """Return [key heads, heads that share one x queries, width] as [queries, heads, width]."""
    count = block.end - block.first
    return grouped.view(key_heads, -1, count, grouped.shape[-1]).permute(2, 0, 1, 3).flatten(1, 2)
