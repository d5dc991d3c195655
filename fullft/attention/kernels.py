"""Which kernel attends on CUDA, and how it is called: torch's flash attention, flash-attn's, or blocks in plain torch.

All take tokens of all rows one behind the other, and the bounds of documents among them. Each returns the logsumexp of
scores next to the result, and takes both in its backward.
"""

import importlib
import importlib.metadata
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from fullft.attention import blocks
from fullft.attention.blocks import Scores
from fullft.data.micro_batch import Documents

_HALVES = (torch.bfloat16, torch.float16)
_WIDEST = 256  # of flash attention's heads; widths are multiples of 8
_FLASH_ATTN = (2, 7)  # the first version with these functions

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Documents, Scores], tuple[torch.Tensor, torch.Tensor]]
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Kernel(NamedTuple):
    """Attention within documents.

    Attributes:
        name: for messages.
        forward: from queries [tokens, heads, width], keys and values [tokens, key heads, width], to the result
            [tokens, heads, width] and the logsumexp of scores [heads, tokens], fp32 at least.
        backward: from the result's gradient, these three, the result and the logsumexp, to the three's gradients.
    """

    name: str
    forward: Forward
    backward: Callable[..., Gradients]


def kernel_for(dtype: torch.dtype, width: int, softcap: float | None) -> Kernel:
    """Return the best kernel there is for such vectors.

    Args:
        dtype: of queries, keys and values.
        width: of a head.
        softcap: of scores; torch's kernel knows none.
    """
    is_for_flash = dtype in _HALVES and width % 8 == 0 and width <= _WIDEST
    if is_for_flash and softcap is None and _torch_has_flash():
        return TORCH_FLASH
    if is_for_flash and _flash_attn_is_installed():
        return FLASH_ATTN
    return BLOCKS


def _torch_has_flash() -> bool:
    """Return whether torch's kernel runs on this card; one that is only planned for is taken to be recent."""
    if not torch.cuda.is_available():
        return True
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability() >= (8, 0)


@cache
def _flash_attn_is_installed() -> bool:
    try:
        version = importlib.metadata.version("flash_attn")
        importlib.import_module("flash_attn.flash_attn_interface")
    except ImportError:
        return False
    return tuple(map(int, version.split(".")[:2])) >= _FLASH_ATTN


# ---------------------------------------------------------------------------------------------- torch's own


def _window(scores: Scores) -> tuple[int, int]:
    """Return how many keys before and behind a query it sees; -1 stands for all."""
    return (-1 if scores.window is None else scores.window - 1, 0)


def _torch_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, scores: Scores
) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = _window(scores)
    result, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        documents.bounds,
        documents.bounds,
        documents.longest,
        documents.longest,
        0.0,  # dropout
        scores.window is None,  # causal; with a window its right side says so, as in `torch.nn.attention.varlen`
        False,  # no probabilities
        scale=scores.scaling,
        window_size_left=left,
        window_size_right=right,
    )
    return result, logsumexp


def _torch_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    result: torch.Tensor,
    logsumexp: torch.Tensor,
    documents: Documents,
    scores: Scores,
) -> Gradients:
    left, right = _window(scores)
    gradients: Gradients = torch.ops.aten._flash_attention_backward(
        gradient,
        query,
        key,
        value,
        result,
        logsumexp,
        documents.bounds,
        documents.bounds,
        documents.longest,
        documents.longest,
        0.0,
        scores.window is None,
        torch.empty(2, dtype=torch.uint64, device=query.device),  # of dropout, which there is none of
        torch.empty(0, device=query.device),
        scale=scores.scaling,
        window_size_left=left,
        window_size_right=right,
    )
    return gradients


# ---------------------------------------------------------------------------------------------- flash-attn's


def _flash_attn_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, scores: Scores
) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = _window(scores)
    functions = importlib.import_module("flash_attn.flash_attn_interface")
    result, logsumexp, *_ = functions._flash_attn_varlen_forward(
        query,
        key,
        value,
        documents.bounds,
        documents.bounds,
        documents.longest,
        documents.longest,
        dropout_p=0.0,
        softmax_scale=scores.scaling,
        causal=True,
        window_size_left=left,
        window_size_right=right,
        softcap=scores.softcap or 0.0,
    )
    return result, logsumexp


def _flash_attn_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    result: torch.Tensor,
    logsumexp: torch.Tensor,
    documents: Documents,
    scores: Scores,
) -> Gradients:
    left, right = _window(scores)
    functions = importlib.import_module("flash_attn.flash_attn_interface")
    gradients = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
    functions._flash_attn_varlen_backward(
        gradient,
        query,
        key,
        value,
        result,
        logsumexp,
        *gradients,
        documents.bounds,
        documents.bounds,
        documents.longest,
        documents.longest,
        dropout_p=0.0,
        softmax_scale=scores.scaling,
        causal=True,
        window_size_left=left,
        window_size_right=right,
        softcap=scores.softcap or 0.0,
        alibi_slopes=None,
        deterministic=False,
    )
    return gradients


TORCH_FLASH = Kernel("torch's flash attention", _torch_forward, _torch_backward)
FLASH_ATTN = Kernel("flash-attn", _flash_attn_forward, _flash_attn_backward)
BLOCKS = Kernel("blocks of queries", blocks.forward, blocks.backward)
