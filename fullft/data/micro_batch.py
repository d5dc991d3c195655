"""The micro-batch, which one forward and backward pass works on, and the global batch, of which a step consists."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

IGNORED = -100  # the label of a token that is no target


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward and backward pass.

    Attributes:
        inputs: `input_ids` [batch, sequence] int64 and, for packed sequences, `position_ids` of the same shape, which
            restart at 0 with each document. There is no attention mask: padding comes last, where a causal model
            cannot see it, and packed documents are told apart by their positions.
        labels: [batch, sequence] int64, the input ids where a token is a target, -100 elsewhere.
        num_tokens: tokens that are not padding.
        num_target_tokens: labels that are not -100.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    num_tokens: int
    num_target_tokens: int

    @staticmethod
    def of(input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> "MicroBatch":
        """Make a micro-batch without padding.

        Args:
            input_ids: [batch, sequence] int64.
            labels: of the same shape; None makes every token a target that has one before it.
        """
        labels = input_ids.clone() if labels is None else labels
        num_target_tokens = int((labels[:, 1:] != IGNORED).sum())
        return MicroBatch({"input_ids": input_ids}, labels, input_ids.numel(), num_target_tokens)

    def to(self, device: torch.device) -> "MicroBatch":
        """Copy the tensors to a device."""
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return MicroBatch(inputs, self.labels.to(device), self.num_tokens, self.num_target_tokens)


@dataclass(frozen=True)
class GlobalBatch:
    """The micro-batches of one optimizer step, on the CPU.

    Attributes:
        micro_batches: in the order of the computation.
    """

    micro_batches: Sequence[MicroBatch]

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self.micro_batches)

    def __len__(self) -> int:
        return len(self.micro_batches)

    @property
    def num_tokens(self) -> int:
        """The tokens of the step, without padding."""
        return sum(micro_batch.num_tokens for micro_batch in self.micro_batches)

    @property
    def num_target_tokens(self) -> int:
        """The target tokens of the step. They divide every micro-batch's loss, so that all tokens weigh alike."""
        return sum(micro_batch.num_target_tokens for micro_batch in self.micro_batches)
