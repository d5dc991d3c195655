"""What surrounds AdamW's kernel: wide masters and gradients are made before it, and masters are rounded behind it.

On a GPU with a compiler that takes three kernels in place of nine, and moves 22 bytes per parameter in place of 66.
Nothing in it can round otherwise when fused: there are casts, integers, and one product. So the bits are the same.

AdamW's own kernel stays torch's. Fused with it, a step would move 26 bytes per parameter instead of 50, but a compiler
contracts products and sums as it pleases, and the step would no longer be torch's to the bit.
"""

import torch

from fullft.model.precision import join, round_stochastically, split


def widen(
    weights: torch.Tensor,
    remainder: torch.Tensor | None,
    gradient: torch.Tensor,
    scale: torch.Tensor | None,
    master: torch.Tensor,
    wide_gradient: torch.Tensor,
) -> None:
    """Make the numbers that AdamW works on.

    Args:
        weights: [n], of any floating dtype.
        remainder: [n] int16, the lower halves of split masters.
        gradient: [n], of any floating dtype.
        scale: scalar fp32 that the gradient is multiplied with; None leaves it.
        master: [n], set; the weights themselves where these are wide enough.
        wide_gradient: [n], set; the gradient itself where it is wide enough.
    """
    if remainder is not None:
        join(weights, remainder, master)
    elif master is not weights:
        master.copy_(weights)
    if wide_gradient is not gradient:
        wide_gradient.copy_(gradient)
    if scale is not None:
        wide_gradient.mul_(scale)


def narrow(
    master: torch.Tensor, weights: torch.Tensor, remainder: torch.Tensor | None, noise: torch.Tensor | None
) -> None:
    """Round updated masters to the weights' dtype.

    Args:
        master: [n] float32; overwritten.
        weights: [n] bfloat16, set.
        remainder: [n] int16, set to the lower halves of split masters; None keeps none.
        noise: [n] int32, for stochastic rounding; None rounds to the nearest.
    """
    if remainder is not None:
        split(master, weights, remainder)
    elif noise is not None:
        round_stochastically(master, weights, noise)
    else:
        weights.copy_(master)
