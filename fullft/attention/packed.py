"""Attention within documents, on CUDA: one operator for forward, one for backward, whichever kernel does the work.

Queries, keys, values, the result and the logsumexp of scores are kept for backward: bytes in proportion to the tokens,
where a mask takes their square. Compilers, the memory tracker and selective checkpointing see one operator.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.library import custom_op
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface

from fullft.attention.blocks import Scores
from fullft.attention.interface import attention_by, windows_need_none
from fullft.attention.kernels import Kernel, kernel_for
from fullft.attention.positions import documents_of
from fullft.data.micro_batch import Documents

NAME = "packed"


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    position_ids: torch.Tensor | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attend as `interface.attention_by` asks. Kernels take values of the keys' width."""
    width, missing = value.shape[3], key.shape[3] - value.shape[3]
    value = pad(value, (0, missing)) if missing else value
    attended: torch.Tensor = packed_attention(query, key, value, scaling, position_ids, window, softcap)[0]
    return attended[..., :width]


AttentionInterface.register(NAME, attention_by(_attend, narrow_values=True))
AttentionMaskInterface.register(NAME, windows_need_none)


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    position_ids: torch.Tensor | None,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the result, of the queries' shape, and the logsumexp of scores, [heads, batch x sequence]."""
    kernel, documents = _prepared(query, position_ids, softcap)
    scores = Scores(scaling, window, softcap)
    result, logsumexp = kernel.forward(_by_token(query), _by_token(key), _by_token(value), documents, scores)
    return _by_row(result, len(query)), logsumexp


def _backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    result: torch.Tensor,
    logsumexp: torch.Tensor,
    position_ids: torch.Tensor | None,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of queries, keys and values."""
    kernel, documents = _prepared(query, position_ids, softcap)
    tokens = map(_by_token, (gradient, query, key, value, result))
    found = kernel.backward(*tokens, logsumexp, documents, Scores(scaling, window, softcap))
    of_queries, of_keys, of_values = (_by_row(each, len(query)) for each in found)
    return of_queries, of_keys, of_values


def _prepared(
    query: torch.Tensor, position_ids: torch.Tensor | None, softcap: float | None
) -> tuple[Kernel, Documents]:
    batch, _, length, width = query.shape
    return kernel_for(query.dtype, width, softcap), documents_of(position_ids, batch, length, query.device)


def _by_token(vectors: torch.Tensor) -> torch.Tensor:
    """Return [batch, heads, sequence, width] as [batch x sequence, heads, width], a view where memory allows it."""
    tokens = vectors.transpose(1, 2).flatten(0, 1)
    return tokens if tokens.stride(2) == 1 else tokens.contiguous()


def _by_row(tokens: torch.Tensor, batch: int) -> torch.Tensor:
    """View [batch x sequence, heads, width] as [batch, heads, sequence, width]."""
    rows: torch.Tensor = tokens.contiguous().view(batch, -1, *tokens.shape[1:])
    return rows.transpose(1, 2)


# ---------------------------------------------------------------------------------------------- the operators


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    query, key, value, scaling, position_ids, *others = inputs
    ctx.scores = (scaling, *others)
    ctx.save_for_backward(query, key, value, *output, position_ids)


def _differentiate(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    gradients = _backward_operator(gradient, *ctx.saved_tensors, *ctx.scores)
    return *gradients, None, None, None, None


def _like_result(vectors: torch.Tensor) -> torch.Tensor:
    """Allocate as `_by_row` returns it: compiled graphs rely on it, and layers continue without a copy."""
    return torch.empty_like(vectors.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _like_results(query: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    return _like_result(query), query.new_empty(query.shape[1], query.shape[0] * query.shape[2], dtype=wide)


packed_attention = custom_op("fullft::packed_attention", _forward, mutates_args=())
packed_attention.register_fake(_like_results)
_backward_operator = custom_op("fullft::packed_attention_backward", _backward, mutates_args=())
_backward_operator.register_fake(lambda _, query, key, value, *__: tuple(map(_like_result, (query, key, value))))
packed_attention.register_autograd(_differentiate, setup_context=_keep)
# What the operators run, for the memory tracker: what they allocate besides their results is a step's memory too.
BODIES: dict[Any, Callable[..., Any]] = {
    torch.ops.fullft.packed_attention.default: _forward,
    torch.ops.fullft.packed_attention_backward.default: _backward,
}
