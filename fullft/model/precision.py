"""Master weights: the fp32 numbers that bf16 weights stand for, kept in no more bytes than fp32 takes.

Owns the arithmetic between an fp32 number, its bf16 weight and what that rounds away; no state and no step.
"""

import torch

# A float32 is 1 sign, 8 exponent and 23 fraction bits; a bfloat16 is its upper half.
_HALF_BITS = 16
_ROUND_UP = 1 << 15


def split(master: torch.Tensor, weights: torch.Tensor, remainder: torch.Tensor) -> None:
    """Split fp32 numbers into bf16 weights and 16-bit remainders, which together are every bit of them.

    The weight is the nearest bf16 number. Of two equally near ones it is the one of larger magnitude; the even one,
    which torch's cast would take, could not be told from its neighbour by 16 bits (there are 2^16 + 1 numbers that
    round to an even weight).

    Args:
        master: [n] float32; overwritten.
        weights: [n] bfloat16, set.
        remainder: [n] int16, set to the lower half of the number's bits.
    """
    bits = master.view(torch.int32)
    remainder.copy_(bits)  # the cast keeps the lower half
    bits.add_(_ROUND_UP).bitwise_right_shift_(_HALF_BITS)
    weights.view(torch.int16).copy_(bits)


def join(weights: torch.Tensor, remainder: torch.Tensor, master: torch.Tensor) -> None:
    """Put split numbers together again.

    Args:
        weights: [n] bfloat16.
        remainder: [n] int16.
        master: [n] float32, set.
    """
    bits = master.view(torch.int32)
    bits.copy_(weights.view(torch.int16)).bitwise_left_shift_(_HALF_BITS)
    bits.add_(remainder)  # as a signed number: where the weight was rounded up, it takes the excess away


def round_stochastically(numbers: torch.Tensor, weights: torch.Tensor, generator: torch.Generator | None) -> None:
    """Round fp32 numbers to one of their two bf16 neighbours, the nearer the likelier: right on average.

    Args:
        numbers: [n] float32; overwritten.
        weights: [n] bfloat16, set.
        generator: of the numbers' device; None draws from torch's own stream.
    """
    bits = numbers.view(torch.int32)
    noise = torch.randint(0, 1 << _HALF_BITS, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    bits.add_(noise).bitwise_right_shift_(_HALF_BITS)
    weights.view(torch.int16).copy_(bits)
