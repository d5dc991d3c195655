"""The micro-batch, which one forward and backward pass works on, and the global batch, of which a step consists."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from fullft.tracing import is_tracing

IGNORED = -100  # the label of a token that is no target


@dataclass(frozen=True)
class Documents:
    """Where the documents of a packed micro-batch lie among its tokens, row after row.

    They are known when rows are joined. Read from positions on a device, they would cost a wait for it.

    Attributes:
        lengths: tokens of each document. The padding of a row is one more.
        bounds: [documents + 1] int32: how many tokens are before each document, and in all; on the inputs' device.
    """

    lengths: tuple[int, ...]
    bounds: torch.Tensor

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device | None = None) -> "Documents":
        """Lay documents out, one behind the other.

        Args:
            lengths: tokens of each.
            device: of the bounds.
        """
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return Documents(tuple(lengths), bounds if device is None else bounds.to(device))

    @property
    def longest(self) -> int:
        """Tokens of the longest one."""
        return max(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all."""
        return sum(self.lengths)


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
        is_last: whether it is the last one of its step on this rank.
        documents: where positions restart; None where rows are not packed, or where only the positions say it.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    num_tokens: int
    num_target_tokens: int
    is_last: bool = True
    documents: Documents | None = None

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

    def to(self, device: torch.device, *, copy: bool = False) -> "MicroBatch":
        """Copy the tensors to a device; the host goes on without waiting for it.

        Args:
            device: where the model computes.
            copy: whether to copy them where they are there already.
        """

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            # A card copies by itself, but from locked memory alone.
            is_locked = device.type == "cuda" and not is_tracing()
            return (tensor.pin_memory() if is_locked else tensor).to(device, non_blocking=is_locked, copy=copy)

        documents = self.documents
        if documents is not None and device.type != "cpu":  # whose attention takes their lengths
            documents = replace(documents, bounds=moved(documents.bounds))
        inputs = {name: moved(tensor) for name, tensor in self.inputs.items()}
        return replace(self, inputs=inputs, labels=moved(self.labels), documents=documents)

    def without_targets(self) -> "MicroBatch":
        """Return one of the same shape that teaches nothing."""
        return replace(self, labels=torch.full_like(self.labels, IGNORED), num_tokens=0, num_target_tokens=0)


@dataclass(frozen=True)
class GlobalBatch:
    """The micro-batches of one optimizer step, on the CPU: this rank's, and what those of all ranks hold.

    Attributes:
        seed: of the run.
        step: counted from 1.
        micro_batches: this rank's, in the order of the computation, by their places in the step over all ranks.
        num_tokens: of the step over all ranks, without padding.
        num_target_tokens: of the step over all ranks. They divide every micro-batch's loss: all tokens weigh alike.
    """

    seed: int
    step: int
    micro_batches: Mapping[int, MicroBatch]
    num_tokens: int
    num_target_tokens: int

    @staticmethod
    def of(micro_batches: Sequence[MicroBatch], seed: int = 0, step: int = 1) -> "GlobalBatch":
        """Make a global batch of which one rank has everything."""
        return GlobalBatch(
            seed,
            step,
            dict(enumerate(micro_batches)),
            sum(micro_batch.num_tokens for micro_batch in micro_batches),
            sum(micro_batch.num_target_tokens for micro_batch in micro_batches),
        )

    def __iter__(self) -> Iterator[MicroBatch]:
        """Yield the micro-batches, each with a random stream of its own: dropout does not depend on who computes it."""
        for number, micro_batch in self.micro_batches.items():
            torch.manual_seed(_seed_of(self.seed, self.step, number))
            yield micro_batch

    def __len__(self) -> int:
        return len(self.micro_batches)


def _seed_of(seed: int, step: int, number: int) -> int:
    """Return the seed of a micro-batch's random stream."""
    key = repr((seed, step, number)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little", signed=True)
