"""Batches: sequences in an order that any step can be resumed from, dealt into micro-batches."""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, cycle
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from fullft.config.config import Config
from fullft.config.steps import Steps
from fullft.data.dealing import Dealing, deal, find_dealings, most_micro_batches
from fullft.data.micro_batch import IGNORED, Documents, GlobalBatch, MicroBatch
from fullft.data.packing import pack

Row = dict[str, Any]  # tokenised, or the columns of several such rows


class Batches:
    """Sequences in global batches. Which batch belongs to which step is a pure function of the seed and the step.

    Args:
        rows: tokenised, as `load_data` makes them.
        config: `max_length`, `packing`, `seed` and the batch sizes are read. If it `is_flat`, a micro-batch is one row,
            in which sequences lie behind each other; else it has a row per sequence, padded to the longest.
        pad_token_id: fills the end of a micro-batch's shorter rows.

    Attributes:
        longest: tokens of the longest sequence.
    """

    def __init__(self, rows: Dataset, config: Config, pad_token_id: int) -> None:
        self.rows = rows
        self.lengths: list[int] = rows["num_tokens"][:]
        self.num_targets: list[int] = rows["num_target_tokens"][:]
        self.documents = pack(self.lengths, config.max_length) if config.packing else [[i] for i in range(len(rows))]
        self.packing, self.most_tokens, self.is_flat = config.packing, config.micro_batch_tokens or 0, config.is_flat
        self.pad_token_id = pad_token_id
        self.seed, self.place = config.seed, config.place
        self.batch_size = config.per_device_train_batch_size
        self.sequences_per_step = config.global_batch_size
        self.steps_per_epoch = math.ceil(len(self.documents) / self.sequences_per_step)
        self._sequence_lengths: list[int] = [
            sum(map(self.lengths.__getitem__, documents)) for documents in self.documents
        ]
        self.longest = max(self._sequence_lengths)
        self._order: tuple[int, list[int]] = (-1, [])  # the current epoch, and its order

    def dealt(self, config: Config) -> "Batches":
        """Return the same steps, dealt into micro-batches as the plan has decided.

        Args:
            config: of these batches, but for what was open: `micro_batch_tokens`, at least as many as the longest
                sequence has, and `is_flat` are read.
        """
        others = copy.copy(self)
        others.most_tokens, others.is_flat = config.micro_batch_tokens or 0, config.is_flat
        return others

    # ------------------------------------------------------------------------------------------ the steps

    def global_batch(self, step: int) -> GlobalBatch:
        """Make the micro-batches of one optimizer step, on the CPU.

        Args:
            step: counted from 1. An epoch's last global batch may be smaller.
        """
        sequences = self._sequences(step)
        mine = self._dealt(self._groups(sequences))
        rows = self._rows(sequences)
        return GlobalBatch(
            self.seed,
            step,
            dict(mine),
            num_tokens=sum(self.lengths[row] for row in rows),
            num_target_tokens=sum(self.num_targets[row] for row in rows),
        )

    def _sequences(self, step: int) -> list[int]:
        """Return the sequences of a step over all ranks."""
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        if self._order[0] != epoch:
            # The order depends on (seed, epoch) alone: no state to save, and no draw from torch's random stream.
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.documents))
            self._order = (epoch, order.tolist())
        start = position * self.sequences_per_step
        return self._order[1][start : start + self.sequences_per_step]

    def _groups(self, sequences: list[int]) -> list[list[int]]:
        """Deal a step's sequences into micro-batches."""
        if self.most_tokens:
            groups = deal([self._sequence_lengths[number] for number in sequences], self.most_tokens, self.place.count)
            return [[sequences[place] for place in group] for group in groups]
        return [sequences[first : first + self.batch_size] for first in range(0, len(sequences), self.batch_size)]

    def find_dealings(self, config: Config) -> list[Dealing]:
        """List ways to deal every step by tokens, those of the fewest micro-batches first.

        Args:
            config: the length of the run is read.
        """
        largest_step = self._largest_step(Steps(config, self.steps_per_epoch).total)
        return find_dealings(self._lengths_of_steps(config), self.place.count, self.longest, largest_step)

    def most_micro_batches(self, config: Config) -> int:
        """Return how many micro-batches a rank has in a step that is dealt by tokens, at most.

        Args:
            config: the length of the run is read.
        """
        return most_micro_batches(self._lengths_of_steps(config), self.most_tokens, self.place.count)

    def _lengths_of_steps(self, config: Config) -> Iterator[list[int]]:
        """Yield the tokens of each step's sequences."""
        total = Steps(config, self.steps_per_epoch).total
        return ([self._sequence_lengths[number] for number in self._sequences(step)] for step in range(1, total + 1))

    def _largest_step(self, total: int) -> int:
        """Return the tokens of the largest of so many steps."""
        lengths = np.array(self._sequence_lengths)
        starts = np.arange(0, len(lengths), self.sequences_per_step)
        largest = 0
        for first in range(1, total + 1, self.steps_per_epoch):
            self._sequences(first)
            sums = np.add.reduceat(lengths[self._order[1]], starts)
            largest = max(largest, int(sums[: total + 1 - first].max()))
        return largest

    # ------------------------------------------------------------------------------------------ all rows

    def by_length(self) -> Iterator[MicroBatch]:
        """Make this rank's micro-batches of all sequences, the shortest first, for evaluation.

        More short ones come together, but no more tokens, padding included, than `largest` has.
        """
        room = self._most_joined() if self.is_flat else self.batch_size * self.longest
        groups: list[list[int]] = [[]]
        joined = 0
        for number in sorted(range(len(self.documents)), key=self._sequence_lengths.__getitem__):
            length = self._sequence_lengths[number]
            # Behind each other, or each padded to this one, which is the longest so far.
            needed = joined + length if self.is_flat else (len(groups[-1]) + 1) * length
            if groups[-1] and needed > room:
                groups.append([])
                joined = 0
            groups[-1].append(number)
            joined += length
        return (micro_batch for _, micro_batch in self._dealt(groups))

    def largest(self) -> MicroBatch:
        """Make a micro-batch of the longest sequences: none of the run takes more memory."""
        longest = sorted(range(len(self.documents)), key=lambda number: -self._sequence_lengths[number])
        micro_batch = self._filled(longest) if self.is_flat else self._collate(longest[: self.batch_size])
        # Another one may have more targets, but at most all tokens.
        ids = micro_batch.inputs["input_ids"]
        return replace(micro_batch, labels=ids.clone(), num_target_tokens=ids[:, 1:].numel())

    def _filled(self, sequences: list[int]) -> MicroBatch:
        """Join sequences, again and again, to the most tokens that a micro-batch may have; the last one is cut."""
        room = min(self._most_joined(), sum(self.lengths))
        joined: list[Row] = []
        for row in cycle(self._rows(sequences)):
            joined.append(_cut(self.rows[row], room))
            room -= joined[-1]["num_tokens"]
            if room == 0:
                return self._padded([joined])
        raise AssertionError("there is a row")

    def _most_joined(self) -> int:
        """Return the tokens of the largest micro-batch that is one row."""
        if self.most_tokens:
            return max(self.most_tokens, self.longest)  # a longer held-out row is one by itself
        return sum(sorted(self._sequence_lengths)[-self.batch_size :])

    def _rows(self, sequences: Iterable[int]) -> list[int]:
        return [row for number in sequences for row in self.documents[number]]

    @property
    def mean_length(self) -> float:
        """Tokens of the average sequence."""
        return sum(self.lengths) / len(self.documents)

    # ------------------------------------------------------------------------------------------ micro-batches

    def _dealt(self, groups: list[list[int]]) -> Iterator[tuple[int, MicroBatch]]:
        """Yield this rank's micro-batches, with their places among all, where ranks take turns at groups of sequences.

        All ranks have as many: one that has none left gets a micro-batch without targets.
        """
        rank, count = self.place.rank, self.place.count
        order = list(range(len(groups)))
        if count > 1:  # in each turn all ranks wait for the longest
            size = sum if self.is_flat else max
            order.sort(key=lambda number: -size(self._sequence_lengths[place] for place in groups[number]))
        end = -(-len(groups) // count) * count
        for turn in range(rank, end, count):
            # Without a group left, the smallest one again.
            number = order[turn] if turn < len(groups) else turn
            micro_batch = self._collate(groups[order[min(turn, len(groups) - 1)]])
            if turn >= len(groups):
                micro_batch = micro_batch.without_targets()
            yield number, replace(micro_batch, is_last=turn + count >= end)

    def _collate(self, group: Sequence[int]) -> MicroBatch:
        """Join sequences into one row, or each one's documents into a row of its own."""
        rows = [_split(self.rows[self.documents[number]]) for number in group]
        return self._padded([list(chain(*rows))] if self.is_flat else rows)

    def _padded(self, rows: list[list[Row]]) -> MicroBatch:
        """Join each row's documents, and pad to the longest row."""
        shape = (len(rows), max(sum(each["num_tokens"] for each in row) for row in rows))
        input_ids = torch.full(shape, self.pad_token_id)
        labels = torch.full(shape, IGNORED)
        # Padding gets positions of its own from 0: to the model it is one more document, which no token sees.
        position_ids = torch.zeros(shape, dtype=torch.int64)
        lengths: list[int] = []
        for number, row in enumerate(rows):
            own = [document["num_tokens"] for document in row]
            end = sum(own)
            input_ids[number, :end] = torch.tensor([token for document in row for token in document["input_ids"]])
            labels[number, :end] = torch.tensor([label for document in row for label in document["labels"]])
            position_ids[number, :end] = torch.cat([torch.arange(length) for length in own])
            position_ids[number, end:] = torch.arange(shape[1] - end)
            lengths += [*own, *([shape[1] - end] if end < shape[1] else [])]
        inputs, joins = {"input_ids": input_ids}, self.packing or self.is_flat
        if joins:
            inputs["position_ids"] = position_ids
        return MicroBatch(
            inputs,
            labels,
            num_tokens=sum(document["num_tokens"] for row in rows for document in row),
            num_target_tokens=sum(document["num_target_tokens"] for row in rows for document in row),
            documents=Documents.of(lengths) if joins else None,
        )


def _split(columns: Row) -> list[Row]:
    """Make one dictionary per row of those of columns."""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _cut(row: Row, room: int) -> Row:
    """Return the first tokens of a row, as many as there is room for."""
    return row | {
        "input_ids": row["input_ids"][:room],
        "labels": row["labels"][:room],
        "num_tokens": min(row["num_tokens"], room),
    }
