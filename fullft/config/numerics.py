"""Number formats: what `--precision`, `--master_weights` and `--optim` mean together.

Imports no torch: options are checked before torch is there. `model/precision.py` has the dtypes.
"""

from dataclasses import dataclass
from enum import Enum, unique


@unique
class Format(Enum):
    """A number format."""

    FP32 = "fp32"
    BF16 = "bf16"
    EIGHT_BIT = "8-bit"  # a code in a block of numbers that share a scale

    @property
    def bytes(self) -> int:
        """Bytes per number, without the scales of 8-bit blocks."""
        return {Format.FP32: 4, Format.BF16: 2, Format.EIGHT_BIT: 1}[self]


@dataclass(frozen=True)
class Numerics:
    """The format of everything that a run keeps or computes.

    Attributes:
        weights: in which the model holds its parameters.
        computation: of matrix products; under autocast another one than the weights'.
        masters: what bf16 weights stand for: `split`, fp32 numbers whose lower halves are kept apart; `stochastic`,
            bf16 numbers rounded at random; `none`, themselves.
        gradients: of the sums over micro-batches.
        moments: of AdamW's two moments; with 8 bits, those of embeddings and small tensors stay in fp32.
    """

    weights: Format
    computation: Format
    masters: str
    gradients: Format
    moments: Format

    @staticmethod
    def of(precision: str, master_weights: str, optim: str, accumulates: bool) -> "Numerics":
        """Derive the formats from the words of three options.

        Args:
            precision: `fp32`, `bf16-mixed` or `bf16-true`.
            master_weights: of `bf16-true`.
            optim: `adamw`, or one with 8-bit moments.
            accumulates: whether a step has several micro-batches.
        """
        weights = Format.BF16 if precision == "bf16-true" else Format.FP32
        masters = master_weights if precision == "bf16-true" else "none"
        # torch keeps moments and gradients in the weights' format; masters of either kind are updated in fp32.
        updated_in = weights if masters == "none" else Format.FP32
        return Numerics(
            weights=weights,
            computation=Format.FP32 if precision == "fp32" else Format.BF16,
            masters=masters,
            gradients=updated_in if accumulates else weights,
            moments=updated_in if optim == "adamw" else Format.EIGHT_BIT,
        )

    @property
    def autocast(self) -> bool:
        """Whether `torch.autocast` computes in another format than the weights have."""
        return self.computation is not self.weights

    @property
    def splits(self) -> bool:
        """Whether fp32 masters are split into bf16 weights and 16-bit remainders."""
        return self.masters == "split"
