"""AdamW whose two moments take 8 bits each, on one flat chunk of weights.

How it works: a moment is cut into blocks of 256 elements. Each block is divided by its largest magnitude and rounded to
256 values in [-1, 1], dense around 0 (Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2021,
section 2). The states are laid out as bitsandbytes' are, so either may continue what the other began.

On CUDA bitsandbytes' kernel is called. On a CPU this file replaces it: bitsandbytes looks codes up there in steps of
2^-15, and so loses whatever is smaller, where this one rounds to the nearest code, and is several times as fast.
"""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from fullft.errors import OptionsError
from fullft.tracing import device_type, is_tracing, standing_for_all

BLOCK = 256  # elements that share one scale; chunks must begin at multiples of it
# Elements updated at a time, which bounds the temporaries: 0.5 MiB compiled, 7.3 MiB eager. Smaller ones are slower.
TILE = 1 << 18


@torch.no_grad()
def adamw_8bit_(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    moment1: torch.Tensor,
    moment2: torch.Tensor,
    absmax1: torch.Tensor,
    absmax2: torch.Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """Take one step of AdamW in place. Before the first step all states are zeros.

    A chunk may be cut at multiples of `BLOCK`: the parts give bitwise what the whole gives.

    Args:
        weights: [n] fp32, contiguous as all others.
        gradient: [n] fp32, only read. Not finite, it spoils its block (bitsandbytes on CUDA passes over the element).
        moment1: [n] uint8, codes of the mean gradient.
        moment2: [n] uint8, codes of the mean squared gradient.
        absmax1: [ceil(n / 256)] fp32, the scale of each block of `moment1`.
        absmax2: [ceil(n / 256)] fp32, the scale of each block of `moment2`.
        lr: learning rate.
        beta1: decay of the first moment per step.
        beta2: decay of the second moment per step.
        eps: added to the root of the corrected second moment.
        weight_decay: decoupled; of the weights, per step and `lr`.
        step: counted from 1.

    Raises:
        OptionsError: on CUDA without bitsandbytes.
    """
    if device_type(weights.device) == "cuda":
        if is_tracing():
            return  # one kernel, which takes no memory; the machine that plans may have no bitsandbytes
        book1, book2 = code_books(weights.device)
        _bitsandbytes().optimizer_update_8bit_blockwise(
            *("adam", gradient, weights, moment1, moment2, beta1, beta2, 0.0, 0.0, eps, step, lr, book1, book2),
            *(absmax1, absmax2, weight_decay),
        )
        return
    # Tensors, not floats: a compiled function would be specialised to each value of a float.
    constants = torch.tensor(
        [beta1, 1 - beta1, beta2, 1 - beta2, math.sqrt(1 - beta2**step), eps, -lr / (1 - beta1**step)]
        + [1 - lr * weight_decay],
        dtype=torch.float32,
    )
    tables = _tables(weights)
    weights = weights.detach()  # a parameter would have the tile compiled anew
    count = weights.numel()
    whole = count // BLOCK * BLOCK
    starts = list(standing_for_all(range(0, whole, TILE)))
    ends = [min(start + TILE, whole) for start in starts]
    if whole < count:  # the last block is a tile of its own, of one short row
        starts.append(whole)
        ends.append(count)
    for start, end in zip(starts, ends, strict=True):
        width = min(BLOCK, end - start)
        rows = [tensor[start:end].view(-1, width) for tensor in (weights, gradient, moment1, moment2)]
        scales = [tensor[start // BLOCK : -(-end // BLOCK)] for tensor in (absmax1, absmax2)]
        update = _update_for(weights.device, end - start)
        arguments = (*rows, *scales, *tables, constants)
        for state, value in zip((*rows[2:], *scales), update(*arguments), strict=True):
            state.copy_(value)


def _update_for(device: torch.device, count: int) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Return the compiled update for whole tiles on a CPU; other lengths would each be compiled anew."""
    return _compiled_update() if count == TILE and device.type == "cpu" and not is_tracing() else _update


def require_kernel(device: torch.device) -> None:
    """Check that steps with 8-bit moments can be taken.

    Args:
        device: that computes.

    Raises:
        OptionsError: on CUDA without bitsandbytes.
    """
    if device.type == "cuda":
        _bitsandbytes()


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes.functional  # only here: it takes a second to import, and most runs do without
    except ImportError as error:
        raise OptionsError("--optim adamw_8bit needs bitsandbytes: pip install bitsandbytes") from error
    return bitsandbytes.functional


# ---------------------------------------------------------------------------------------------- one tile


def _update(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    codes1: torch.Tensor,
    codes2: torch.Tensor,
    absmax1: torch.Tensor,
    absmax2: torch.Tensor,
    book1: torch.Tensor,
    book2: torch.Tensor,
    rounding1: torch.Tensor,
    rounding2: torch.Tensor,
    constants: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Update a tile's weights, and return its new codes and scales; each row, [blocks, at most 256], is a block.

    Only the weights are changed in place: then it all compiles to one loop over blocks, without temporaries. Were the
    codes written here too, it would be seven, each with a wait for all threads, which another busy process prolongs.

    Every operator rounds once, and as IEEE 754 says: vectors then agree bitwise with the scalar ends of loops, hence
    chunks with the whole, and the compiled tile with the eager one. So no addcmul and no lerp, which compilers contract
    as they please, and no sqrt, which eager torch takes from MKL, an ulp off.
    """
    beta1, new1, beta2, new2, correction2, eps, rate, keep = constants.unbind()
    mean = _decode(codes1, absmax1, book1).mul_(beta1).add_(gradient * new1)
    square = _decode(codes2, absmax2, book2).mul_(beta2).add_((gradient * gradient).mul_(new2))
    denominator = square.rsqrt().mul_(correction2).reciprocal_().add_(eps)
    weights.mul_(keep).add_((mean / denominator).mul_(rate))
    largest1, largest2 = mean.abs().amax(1), square.amax(1)
    # A block of zeros stays one, whatever its codes; 1e-38 keeps them from being NaN.
    bits1 = mean.div_(largest1.clamp(min=1e-38)[:, None]).view(torch.int32)
    bits2 = square.div_(largest2.clamp(min=1e-38)[:, None]).view(torch.int32)
    new_codes1 = _round(bits1, rounding1) ^ (bits1 >> 31)  # see _rounding_table on negative numbers
    return new_codes1.to(torch.uint8), _round(bits2, rounding2).to(torch.uint8), largest1, largest2


def _decode(codes: torch.Tensor, absmax: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    return book.index_select(0, codes.view(-1).int()).view_as(codes).mul_(absmax[:, None])


def _round(bits: torch.Tensor, rounding: torch.Tensor) -> torch.Tensor:
    upper = (bits >> 16).bitwise_and_(0xFFFF).view(-1)
    return rounding.index_select(0, upper).view_as(bits).add_(bits & 0xFFFF).bitwise_right_shift_(16)


@functools.cache
def _compiled_update() -> Callable[..., tuple[torch.Tensor, ...]]:
    """Compile `_update` for whole tiles on the CPU, which makes it three times as fast, or say why that cannot be."""
    compiled = torch.compile(_update, dynamic=False)
    # Outside all modes: under one that tracks memory the first call would run eagerly, and the failure come later.
    with _disable_current_modes(), torch.no_grad():
        flat = torch.zeros(TILE)
        codes = torch.zeros(TILE, dtype=torch.uint8)
        rows = [tensor.view(-1, BLOCK) for tensor in (flat, flat.clone(), codes, codes.clone())]
        scales = [torch.zeros(TILE // BLOCK), torch.zeros(TILE // BLOCK)]
        arguments = (*rows, *scales, *_tables(flat), torch.ones(8))
        try:
            compiled(*arguments)
        except Exception as error:  # whatever a compiler may lack
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            warnings.warn(f"8-bit steps on the CPU run at a third of their speed, not compiled: {reason}", stacklevel=2)
            return _update
    return compiled


# ---------------------------------------------------------------------------------------------- code books


@functools.cache
def code_books(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the values that codes stand for: bitsandbytes' `create_dynamic_map`, bit for bit.

    Args:
        device: the books are made once for each.

    Returns:
        The book of the first moment, which has a sign, and of the second, which has none: [256] fp32 each, ascending.
        Real tensors, also under `FakeTensorMode`.
    """
    with _disable_current_modes():  # fake tensors, and a tracker that would count the tables as the step's
        return _code_book(signed=True).to(device), _code_book(signed=False).to(device)


def _code_book(signed: bool) -> torch.Tensor:
    """Lay out seven decades, from 1e-7 to 1; each has twice as many values as the one below, evenly spaced."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, (1 if signed else 2) * 2**decade + 1, dtype=torch.float32)
        middles = (10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += middles
        values += [-value for value in middles] if signed else []
    return torch.tensor(sorted(values), dtype=torch.float32)


def _tables(like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return both code books and both rounding tables."""
    return (*code_books(like.device), *_rounding_tables(like.device))


@functools.cache
def _rounding_tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    with _disable_current_modes():  # fake tensors, and a tracker that would count the tables as the step's
        book1, book2 = code_books(torch.device("cpu"))
        between1, between2 = (book1[:-1] + book1[1:]) / 2, (book2[:-1] + book2[1:]) / 2
        # Only 0 is rounded to a second moment of 0: a first moment next to it would be divided by eps alone as soon as
        # a gradient is 0. (bitsandbytes takes that risk on CUDA, and not on the CPU.)
        between2[0] = 0
        return _rounding_table(between1).to(device), _rounding_table(between2).to(device)


def _rounding_table(between: torch.Tensor) -> torch.Tensor:
    """Tabulate the nearest code over the upper 16 bits of an fp32 number in [-1, 1].

    Those bits leave a range of numbers, too narrow for more than one boundary between codes. The entry holds the code
    before it in bits 16 to 23 and, in the bits below, what makes the lower 16 bits of a number carry into them iff the
    number is past the boundary: (entry + lower) >> 16 is the nearest code. As the bits of a negative number grow, its
    code falls, so its entry counts in codes xor 255.

    Args:
        between: [255] fp32, the boundaries; a number equal to one gets the lower code.

    Returns:
        [65536] int32.
    """
    upper = torch.arange(1 << 16, dtype=torch.int32)
    magnitude = (upper & 0x7FFF) << 16
    is_negative = upper >= 1 << 15
    sign = torch.where(is_negative, -1.0, 1.0)
    first = torch.bucketize(magnitude.view(torch.float32) * sign, between)
    last = torch.bucketize((magnitude | 0xFFFF).view(torch.float32) * sign, between)
    boundary = between[torch.minimum(first, last).clamp(max=254)].abs().view(torch.int32) & 0xFFFF
    carried_from = torch.where(is_negative, boundary, boundary + 1)  # on the boundary itself: the lower code
    carry = torch.where(first == last, 0, (1 << 16) - carried_from)
    return (torch.where(is_negative, first ^ 255, first) << 16 | carry).int()
