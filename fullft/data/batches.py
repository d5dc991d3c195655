"""Batches: sequences in an order that any step can be resumed from, padded or packed into micro-batches."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from datasets import Dataset

from fullft.config.config import Config
from fullft.data.micro_batch import IGNORED, Documents, GlobalBatch, MicroBatch
from fullft.data.packing import pack


class Batches:
    """Sequences in global batches. Which batch belongs to which step is a pure function of the seed and the step.

    Args:
        rows: tokenised, as `load_data` makes them.
        config: `max_length`, `packing`, `seed` and the batch sizes are read.
        pad_token_id: fills the end of a micro-batch's shorter sequences.
    """

    def __init__(self, rows: Dataset, config: Config, pad_token_id: int) -> None:
        self.rows = rows
        self.lengths: list[int] = rows["num_tokens"][:]
        self.num_targets: list[int] = rows["num_target_tokens"][:]
        self.documents = pack(self.lengths, config.max_length) if config.packing else [[i] for i in range(len(rows))]
        self.packing = config.packing
        self.pad_token_id = pad_token_id
        self.seed, self.place = config.seed, config.place
        self.batch_size = config.per_device_train_batch_size
        self.sequences_per_step = config.global_batch_size
        self.steps_per_epoch = math.ceil(len(self.documents) / self.sequences_per_step)
        self._longest = max(map(self._length, range(len(self.documents))))
        self._order: tuple[int, list[int]] = (-1, [])  # the current epoch, and its order

    def global_batch(self, step: int) -> GlobalBatch:
        """Make the micro-batches of one optimizer step, on the CPU.

        Args:
            step: counted from 1. An epoch's last global batch may be smaller.
        """
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        if self._order[0] != epoch:
            # The order depends on (seed, epoch) alone: no state to save, and no draw from torch's random stream.
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.documents))
            self._order = (epoch, order.tolist())
        start = position * self.sequences_per_step
        sequences = self._order[1][start : start + self.sequences_per_step]
        groups = [sequences[first : first + self.batch_size] for first in range(0, len(sequences), self.batch_size)]
        # Packed sequences, nearly all full, are padded to one length, which one compiled graph serves.
        mine = self._dealt(groups, at_least=self._longest if self.packing else 0)
        rows = [row for sequence in sequences for row in self.documents[sequence]]
        return GlobalBatch(
            self.seed,
            step,
            dict(mine),
            num_tokens=sum(self.lengths[row] for row in rows),
            num_target_tokens=sum(self.num_targets[row] for row in rows),
        )

    def by_length(self) -> Iterator[MicroBatch]:
        """Make this rank's micro-batches of all sequences, the shortest first, for evaluation.

        More short ones come together, but no more tokens, padding included, than `largest` has.
        """
        sequences = sorted(range(len(self.documents)), key=self._length)
        room, start = self.batch_size * self._longest, 0
        groups = []
        for end in range(1, len(sequences) + 1):
            if end == len(sequences) or (end + 1 - start) * self._length(sequences[end]) > room:
                groups.append(sequences[start:end])
                start = end
        return (micro_batch for _, micro_batch in self._dealt(groups))

    def largest(self) -> MicroBatch:
        """Make a micro-batch of the longest sequences: none of the run takes more memory."""
        longest = sorted(range(len(self.documents)), key=lambda number: -self._length(number))
        micro_batch = self._collate(longest[: self.batch_size])
        # Another one may have more targets, but at most all tokens.
        ids = micro_batch.inputs["input_ids"]
        return replace(micro_batch, labels=ids.clone(), num_target_tokens=ids[:, 1:].numel())

    def _length(self, sequence: int) -> int:
        return sum(self.lengths[i] for i in self.documents[sequence])

    @property
    def mean_length(self) -> float:
        """Tokens of the average sequence."""
        return sum(self.lengths) / len(self.documents)

    def _dealt(self, groups: list[list[int]], at_least: int = 0) -> Iterator[tuple[int, MicroBatch]]:
        """Yield this rank's micro-batches, with their places among all, where ranks take turns at groups of sequences.

        All ranks have as many: one that has none left gets a micro-batch without targets.
        """
        rank, count = self.place.rank, self.place.count
        order = list(range(len(groups)))
        if count > 1:  # in each turn all ranks wait for the longest
            order.sort(key=lambda number: -max(map(self._length, groups[number])))
        end = -(-len(groups) // count) * count
        for turn in range(rank, end, count):
            # Without a group left, of a shape that is there anyway: another one could need another graph.
            number = order[turn] if turn < len(groups) else turn
            micro_batch = self._collate(groups[order[min(turn, len(groups) - 1)]], at_least)
            if turn >= len(groups):
                micro_batch = micro_batch.without_targets()
            yield number, replace(micro_batch, is_last=turn + count >= end)

    def _collate(self, group: Sequence[int], at_least: int = 0) -> MicroBatch:
        """Join each sequence's documents, and pad to the longest sequence of the micro-batch, or to so many tokens."""
        sequences = [self.rows[self.documents[number]] for number in group]
        shape = (len(group), max(at_least, *(sum(sequence["num_tokens"]) for sequence in sequences)))
        input_ids = torch.full(shape, self.pad_token_id)
        labels = torch.full(shape, IGNORED)
        # Padding gets positions of its own from 0: to the model it is one more document, which no token sees.
        position_ids = torch.zeros(shape, dtype=torch.int64)
        lengths: list[int] = []
        for number, sequence in enumerate(sequences):
            end = sum(sequence["num_tokens"])
            input_ids[number, :end] = torch.tensor([token for ids in sequence["input_ids"] for token in ids])
            labels[number, :end] = torch.tensor([label for labels in sequence["labels"] for label in labels])
            position_ids[number, :end] = torch.cat([torch.arange(length) for length in sequence["num_tokens"]])
            position_ids[number, end:] = torch.arange(shape[1] - end)
            lengths += [*sequence["num_tokens"], *([shape[1] - end] if end < shape[1] else [])]
        inputs = {"input_ids": input_ids}
        if self.packing:
            inputs["position_ids"] = position_ids
        return MicroBatch(
            inputs,
            labels,
            num_tokens=sum(sum(sequence["num_tokens"]) for sequence in sequences),
            num_target_tokens=sum(sum(sequence["num_target_tokens"]) for sequence in sequences),
            documents=Documents.of(lengths) if self.packing else None,
        )
