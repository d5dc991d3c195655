"""Flash attention in plain torch: with the arguments of torch's kernels and of flash-attn's functions, and their rules.

Each document is a product with a mask of its own, so that it shares nothing with the code that is tested. Registered
as torch's kernel for CPUs, it is called through torch's dispatcher, which checks arguments as it does for a card. The
emulated device, which runs CPUs' kernels, then has it too.
"""

from collections.abc import Iterator
from typing import Any

import torch


def register() -> torch.library.Library:
    """Register both kernels for CPUs, as long as the library that is returned lives."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", _torch_forward, "CPU")
    library.impl("_flash_attention_backward", _torch_backward, "CPU")
    return library


def _torch_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cum_seq_q: torch.Tensor,
    cum_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
) -> tuple[torch.Tensor, ...]:
    assert dropout_p == 0 and not return_debug_mask
    _check(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k)
    window = (window_size_left, 0 if is_causal else window_size_right)
    found = flash_forward(query, key, value, cum_seq_q, scale, window)
    return *found, torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64), query.new_empty(0)


def _torch_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cum_seq_q: torch.Tensor,
    cum_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: torch.Tensor,
    unused: torch.Tensor,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
) -> tuple[torch.Tensor, ...]:
    assert dropout_p == 0 and rng_state.dtype == torch.uint64 and rng_state.shape == (2,)
    _check(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k)
    assert grad_out.stride(2) == out.stride(2) == 1
    window = (window_size_left, 0 if is_causal else window_size_right)
    return flash_backward(grad_out, query, key, value, out, logsumexp, cum_seq_q, scale, window)


class FlashAttn:
    """The module `flash_attn.flash_attn_interface`, in the functions that are used."""

    @staticmethod
    def _flash_attn_varlen_forward(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int = -1,
        window_size_right: int = -1,
        softcap: float = 0.0,
    ) -> tuple[torch.Tensor, ...]:
        assert dropout_p == 0 and causal
        _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        found = flash_forward(q, k, v, cu_seqlens_q, softmax_scale, (window_size_left, window_size_right), softcap)
        return *found, q.new_empty(0), torch.zeros(2, dtype=torch.int64)

    @staticmethod
    def _flash_attn_varlen_backward(
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        softmax_lse: torch.Tensor,
        dq: torch.Tensor,
        dk: torch.Tensor,
        dv: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: torch.Tensor | None,
        deterministic: bool,
        rng_state: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert dropout_p == 0 and causal and alibi_slopes is None and not deterministic and rng_state is None
        _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        window = (window_size_left, window_size_right)
        found = flash_backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q, softmax_scale, window, softcap)
        for to, gradient in zip((dq, dk, dv), found, strict=True):
            to.copy_(gradient)
        return softmax_lse


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    of_queries: torch.Tensor,
    of_keys: torch.Tensor,
    max_q: int,
    max_k: int,
) -> None:
    """Refuse what the kernels refuse, and bounds that do not belong to the tokens."""
    for each in (query, key, value):
        assert each.dim() == 3 and each.stride(2) == 1 and each.dtype == query.dtype
    (tokens, heads, width), key_heads = query.shape, key.shape[1]
    assert key.shape == value.shape == (tokens, key_heads, width) and heads % key_heads == 0
    assert width % 8 == 0 and width <= 256
    assert of_queries.dtype == torch.int32 and of_queries.is_contiguous() and torch.equal(of_queries, of_keys)
    assert of_queries[0] == 0 and of_queries[-1] == tokens and max_q == max_k == int(of_queries.diff().max())


def flash_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    scale: float,
    window: tuple[int, int],
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the result [tokens, heads, width], and the logsumexp of scores [heads, tokens].

    Args:
        query: [tokens, heads, width].
        key: [tokens, key heads, width].
        value: as the keys.
        bounds: [documents + 1].
        scale: of the scores.
        window: how many keys before and behind a query it sees; -1 for all.
        softcap: of the scores; 0 for none.
    """
    result = torch.empty(query.shape, dtype=query.dtype)
    logsumexp = torch.empty(query.shape[1], query.shape[0], dtype=_wide(query))
    for own in _documents(bounds):
        scores, _ = _scores(query[own], key[own], scale, window, softcap)
        logsumexp[:, own] = torch.logsumexp(scores, -1)
        values = _repeated(value[own], query.shape[1])
        result[own] = torch.einsum("hqk,khw->qhw", torch.softmax(scores, -1), values).to(query.dtype)
    return result, logsumexp


def flash_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    result: torch.Tensor,
    logsumexp: torch.Tensor,
    bounds: torch.Tensor,
    scale: float,
    window: tuple[int, int],
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of queries, keys and values, from the result and the logsumexp that forward returned."""
    heads = query.shape[1]
    gradients = tuple(torch.empty(each.shape, dtype=each.dtype) for each in (query, key, value))
    for own in _documents(bounds):
        scores, slope = _scores(query[own], key[own], scale, window, softcap)
        probabilities = torch.exp(scores - logsumexp[:, own, None])
        above, theirs = gradient[own].to(scores.dtype), result[own].to(scores.dtype)
        keys, values = _repeated(key[own], heads), _repeated(value[own], heads)
        of_probabilities = torch.einsum("qhw,khw->hqk", above, values)
        inner = torch.einsum("qhw,qhw->hq", above, theirs)
        of_scores = probabilities * (of_probabilities - inner[..., None]) * slope * scale
        found = (
            torch.einsum("hqk,khw->qhw", of_scores, keys),
            _summed(torch.einsum("hqk,qhw->khw", of_scores, query[own].to(scores.dtype)), key.shape[1]),
            _summed(torch.einsum("hqk,qhw->khw", probabilities, above), key.shape[1]),
        )
        for whole, part in zip(gradients, found, strict=True):
            whole[own] = part.to(whole.dtype)
    return gradients  # type: ignore[return-value]


def _documents(bounds: torch.Tensor) -> Iterator[slice]:
    numbers = bounds.tolist()
    return (slice(start, end) for start, end in zip(numbers, numbers[1:], strict=False))


def _wide(vectors: torch.Tensor) -> torch.dtype:
    return torch.promote_types(vectors.dtype, torch.float32)


def _scores(
    query: torch.Tensor, key: torch.Tensor, scale: float, window: tuple[int, int], softcap: float
) -> tuple[torch.Tensor, Any]:
    """Return a document's scores [heads, queries, keys], and the slope of its soft cap."""
    wide = _wide(query)
    scores = torch.einsum("qhw,khw->hqk", query.to(wide), _repeated(key, query.shape[1])) * scale
    slope: Any = 1
    if softcap:
        bent = torch.tanh(scores / softcap)
        scores, slope = bent * softcap, 1 - bent**2
    distance = torch.arange(len(query))[:, None] - torch.arange(len(key))
    left, right = window
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left >= 0:
        hidden |= distance > left
    if right >= 0:
        hidden |= -distance > right
    return scores.masked_fill(hidden, float("-inf")), slope


def _repeated(vectors: torch.Tensor, heads: int) -> torch.Tensor:
    """Repeat [tokens, key heads, width] for as many heads, wide enough for sums."""
    return vectors.to(_wide(vectors)).repeat_interleave(heads // vectors.shape[1], 1)


def _summed(gradients: torch.Tensor, key_heads: int) -> torch.Tensor:
    return gradients.unflatten(1, (key_heads, -1)).sum(2)
