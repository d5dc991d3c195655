"""Precision: the dtypes of a run, and the arithmetic between fp32 masters and their bf16 weights.

A bf16 number is the upper half of an fp32 number. A split master keeps the lower half too: together both take the 4
bytes of fp32, and lose no bit of it.
"""

import torch

from fullft.config.numerics import Format, Numerics
from fullft.storage.tiers import Array, fill

_DTYPES = {Format.FP32: torch.float32, Format.BF16: torch.bfloat16, Format.EIGHT_BIT: torch.uint8}


def dtype_of(format: Format) -> torch.dtype:
    """Return torch's dtype of a number format."""
    return _DTYPES[format]


def autocast_of(numerics: Numerics, device: torch.device, *, keeps_copies: bool = True) -> torch.autocast:
    """Return the context that training computes in: autocast to bf16, or one that does nothing.

    Args:
        numerics: the run's formats.
        device: that computes.
        keeps_copies: whether the bf16 copies of weights are kept until the context ends, for further uses. Of a sharded
            model they would be all that sharding spares.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=numerics.autocast, cache_enabled=keeps_copies)


# A float32 is 1 sign, 8 exponent and 23 fraction bits; a bfloat16 is its upper half.
_HALF_BITS = 16
_ROUND_UP = 1 << 15
_PIECE = 1 << 20  # elements split at a time


def split(master: torch.Tensor, weights: torch.Tensor, remainder: torch.Tensor) -> None:
    """Split fp32 numbers into bf16 weights and 16-bit remainders, which together hold every bit.

    The weight is the nearest bf16 number, and of two equally near ones that of larger magnitude. torch's cast takes the
    even one, but 2^16 + 1 fp32 numbers round to an even weight: 16 bits could not give each of them back.

    Args:
        master: [n] float32; overwritten.
        weights: [n] bfloat16, set.
        remainder: [n] int16, set to the lower half of the number's bits.
    """
    bits = master.view(torch.int32)
    remainder.copy_(bits)  # the cast keeps the lower half
    bits.add_(_ROUND_UP).bitwise_right_shift_(_HALF_BITS)
    weights.view(torch.int16).copy_(bits)


def split_into(weights: Array, remainders: Array, values: torch.Tensor) -> None:
    """Split stored numbers into bf16 weights and remainders, wherever these live.

    Args:
        weights: [n] bfloat16, set.
        remainders: [n] int16, set.
        values: n numbers on the CPU, in fp32 or what converts to it exactly.
    """
    # In pieces that stay in the processor's cache: new memory for whole tensors would cost more than reading.
    for number, piece in enumerate(values.flatten().split(_PIECE)):
        master = piece.to(torch.float32, copy=True)
        upper, lower = torch.empty_like(piece, dtype=torch.bfloat16), torch.empty_like(piece, dtype=torch.int16)
        split(master, upper, lower)
        fill(weights, upper, number * _PIECE)
        fill(remainders, lower, number * _PIECE)


def join(weights: torch.Tensor, remainder: torch.Tensor, master: torch.Tensor) -> None:
    """Join split numbers again.

    Args:
        weights: [n] bfloat16.
        remainder: [n] int16.
        master: [n] float32, set.
    """
    bits = master.view(torch.int32)
    bits.copy_(weights.view(torch.int16)).bitwise_left_shift_(_HALF_BITS)
    bits.add_(remainder)  # a signed number: it is negative where the weight was rounded up


def round_stochastically(numbers: torch.Tensor, weights: torch.Tensor, noise: torch.Tensor) -> None:
    """Round fp32 numbers to one of their two bf16 neighbours, the nearer the likelier: right on average.

    Args:
        numbers: [n] float32; overwritten.
        weights: [n] bfloat16, set.
        noise: from `noise_for`.
    """
    bits = numbers.view(torch.int32)
    bits.add_(noise).bitwise_right_shift_(_HALF_BITS)
    weights.view(torch.int16).copy_(bits)


def noise_for(numbers: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Draw what stochastic rounding adds to numbers' bits: [n] int32, from 0 to 2^16 - 1.

    Args:
        numbers: [n].
        generator: of the numbers' device; None draws from torch's own stream.
    """
    shape, device = numbers.shape, numbers.device
    return torch.randint(0, 1 << _HALF_BITS, shape, dtype=torch.int32, device=device, generator=generator)
