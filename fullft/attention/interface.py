"""What transformers asks of attention, and hands over: what goes to an operator of ours, and what to torch's kernel.

A mask of a step of generation, of an image, or of another kind that only the family knows, is honoured as it is. Whole
sequences need none: positions say where documents begin, and an empty mask how long a sliding window is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import sdpa_mask

# From queries [batch, heads, sequence, width], keys and values of as many positions, the factor of scores, positions,
# window and soft cap, to the result, of the queries' shape.
Operator = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, float, torch.Tensor | None, int | None, float | None], torch.Tensor
]


def attention_by(operator: Operator, *, narrow_values: bool = False) -> Callable[..., tuple[torch.Tensor, None]]:
    """Return attention as transformers calls it.

    Args:
        operator: attends within documents.
        narrow_values: whether it takes values that are narrower than keys, such as DeepSeek's. Its result is of the
            values' width then.
    """

    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        position_ids: torch.Tensor | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend.

        Args:
            module: the attention layer.
            query: [batch, heads, queries, width].
            key: [batch, key heads, keys, width].
            value: as the keys.
            attention_mask: of whole sequences None, or what `windows_need_none` returns; else the family's.
            scaling: of the scores; None for 1 / sqrt(width).
            dropout: of the probabilities.
            position_ids: [1 or batch, sequence].
            softcap: of the scores.

        Returns:
            [batch, queries, heads, width], and no probabilities.
        """
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if torch.is_autocast_enabled(query.device.type):  # as it treats torch's own kernel
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        window = _window_of(attention_mask)
        attention_mask = attention_mask if window is None else None
        # Not so with cached keys.
        is_whole = query.shape[2:] == key.shape[2:] and value.shape[2] == key.shape[2]
        fits = value.shape[3] <= key.shape[3] if narrow_values else value.shape[3] == key.shape[3]
        if attention_mask is None and is_whole and fits and dropout == 0:
            return operator(query, key, value, scaling, position_ids, window, softcap).transpose(1, 2), None
        if attention_mask is None and query.shape[2] == key.shape[2]:
            attention_mask = mask_of(position_ids, query, window)
        if softcap is not None:
            return _attend_capped(query, key, value, attention_mask, scaling, dropout, softcap), None
        attended = scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
        )
        return attended.transpose(1, 2), None

    return attend


def whole_sequences_need_none(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Return the mask of a step of generation, or of a sequence longer than a window; positions say the rest."""
    # Some families (Qwen2-MoE, Phi-MoE, Llama-4's chunks) say in the mask alone what a token sees.
    fits = kwargs["q_length"] <= (kwargs.get("local_size") or kwargs["q_length"])
    if kwargs["q_length"] == kwargs["kv_length"] and kwargs.get("attention_mask") is None and fits:
        return None
    mask: torch.Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def windows_need_none(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Return what `whole_sequences_need_none` returns, but where a mask says no more than a window, that alone.

    A window is said by the shape of a mask without elements, [1, 1, 0, window]: it stays so in graphs, and while layers
    are recomputed.
    """
    config, size = kwargs["config"], kwargs.get("local_size") or 0
    is_window = size > 0 and size == getattr(config, "sliding_window", None)
    is_chunk = getattr(config, "attention_chunk_size", None) is not None
    is_whole = kwargs["q_length"] == kwargs["kv_length"] and kwargs.get("attention_mask") is None
    if is_window and not is_chunk and is_whole and kwargs["q_length"] > size and not kwargs.get("use_vmap"):
        return torch.empty(1, 1, 0, size, dtype=torch.bool, device=kwargs["device"])
    return whole_sequences_need_none(*args, **kwargs)


def _window_of(mask: torch.Tensor | None) -> int | None:
    """Return the window that an empty mask stands for."""
    return mask.shape[3] if mask is not None and mask.dim() == 4 and mask.shape[2] == 0 else None


def mask_of(position_ids: torch.Tensor | None, query: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """Make [batch or 1, 1, queries, keys], True where a query sees a key.

    Args:
        position_ids: [1 or batch, sequence]; None for one document per row.
        query: [batch, heads, sequence, width].
        window: a token sees so many, itself included.
    """
    places = torch.arange(query.shape[2], device=query.device)
    seen = places[:, None] >= places
    if window is not None:
        seen &= places[:, None] - places < window
    if position_ids is None:
        return seen[None, None]
    starts = places - position_ids
    return (seen & (starts[:, :, None] == starts[:, None, :]))[:, None]


def _attend_capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    dropout: float,
    softcap: float,
) -> torch.Tensor:
    """Attend with a soft cap and any mask, as families do it without kernels."""
    shared = query.unflatten(1, (key.shape[1], -1))
    scores = torch.matmul(shared, key[:, :, None].mT).flatten(1, 2) * scaling
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    probabilities = drop(torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype), dropout)
    attended = torch.matmul(probabilities.unflatten(1, shared.shape[1:3]), value[:, :, None])
    return attended.flatten(1, 2).transpose(1, 2)
