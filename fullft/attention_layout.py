"""The order in which attention works on packed documents: what one operation multiplies lies together in memory.

Owns how documents are put together and cut into blocks, and the moves of a micro-batch's vectors into that order and
back, one operation each. Documents of one length are worked on together, for a small operation costs by the call.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

Documents = tuple[tuple[int, ...], ...]  # the lengths of those in each sequence


class Stretch(NamedTuple):
    """The same positions of some documents of one length.

    Attributes:
        group: number of these documents.
        starts: the sequence that each is in, and the position there of its first token.
        length: of each.
        first: of the positions, counted within a document.
        end: behind the last of them.
    """

    group: int
    starts: Sequence[tuple[int, int]]
    length: int
    first: int
    end: int

    @property
    def size(self) -> int:
        """How many positions of each."""
        return self.end - self.first

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its documents."""
        return self.size == self.length


class Layout:
    """Where the vectors of a micro-batch lie.

    Attributes:
        blocks: of queries, in the order in which they are worked on: the last of a document first.
        queries: the order of what queries have, block by block.
        keys: the order of what keys have, group by group of documents of one length.
    """

    def __init__(self, documents: Documents, most_queries: int, most_together: int) -> None:
        """Put documents together, and cut them into blocks.

        Args:
            documents: of all sequences.
            most_queries: of a document in a block.
            most_together: tokens of a group of several documents.
        """
        groups = list(_groups(documents, most_together))
        self.blocks = [block for group in groups for block in _blocks(group, most_queries)]
        self.queries, self.keys = Order(self.blocks), Order(groups)


def _groups(documents: Documents, most_together: int) -> Iterator[Stretch]:
    by_length: dict[int, list[tuple[int, int]]] = {}
    for row, lengths in enumerate(documents):
        start = 0
        for length in lengths:
            by_length.setdefault(length, []).append((row, start))
            start += length
    group = 0
    for length, starts in by_length.items():
        count = max(1, most_together // length)
        for first in range(0, len(starts), count):
            yield Stretch(group, starts[first : first + count], length, 0, length)
            group += 1


def _blocks(group: Stretch, most_queries: int) -> Iterator[Stretch]:
    for first in reversed(range(0, group.length, most_queries)):
        yield group._replace(first=first, end=min(first + most_queries, group.length))


class Order:
    """Vectors stretch by stretch, in each by document, head and position."""

    def __init__(self, stretches: Sequence[Stretch]) -> None:
        """Take the stretches, in which every position is once."""
        self._stretches = stretches
        self._known: dict[tuple[int, ...], NDArray[np.int32]] = {}  # all layers ask for the same numbers

    def gather(self, vectors: torch.Tensor, key_heads: int) -> "Gathered":
        """Copy vectors into this order.

        Args:
            vectors: [batch, heads, sequence, width], in memory in whatever order.
            key_heads: that the keys have; heads that share one of these follow each other.
        """
        batch, heads, length, width = vectors.shape
        if vectors.stride(3) != 1 or any(stride % width for stride in vectors.stride()[:3]):
            vectors = vectors.contiguous()
        of_row, of_head, of_position = (stride // width for stride in vectors.stride()[:3])
        count = (batch - 1) * of_row + (heads - 1) * of_head + (length - 1) * of_position + 1
        numbers = self.numbers(heads, of_row, of_head, of_position)
        rows = torch.index_select(vectors.as_strided((count, width), (width, 1)), 0, numbers)
        sizes = [len(stretch.starts) * heads * stretch.size for stretch in self._stretches]
        pieces = [
            piece.view(len(stretch.starts) * key_heads, -1, width)
            for piece, stretch in zip(rows.split(sizes), self._stretches, strict=True)
        ]
        return Gathered(pieces, rows, vectors.shape, self)

    def numbers(self, heads: int, of_row: int, of_head: int, of_position: int, restore: bool = False) -> torch.Tensor:
        """Number the vectors in memory as they come in this order, or, to restore, these as they come in memory.

        Args:
            heads: of the vectors.
            of_row: vectors in memory from a sequence to the next; and so on.
            of_head: of heads.
            of_position: of positions.
            restore: the reverse.
        """
        key = (heads, of_row, of_head, of_position, restore)
        if key not in self._known:
            of_heads = np.arange(heads)[:, None] * of_head
            pieces = [
                (row * of_row + of_heads + np.arange(start + stretch.first, start + stretch.end) * of_position).ravel()
                for stretch in self._stretches
                for row, start in stretch.starts
            ]
            numbers = np.concatenate(pieces)
            self._known[key] = (numbers.argsort() if restore else numbers).astype(np.int32)
        return torch.from_numpy(self._known[key])


class Gathered(NamedTuple):
    """Vectors in an order of their own.

    Attributes:
        pieces: views of them, one for each stretch: [documents × key heads, vectors that share one, width].
        rows: all of them, [batch × sequence × heads, width].
        shape: where they come from, [batch, heads, sequence, width].
        order: which one it is.
    """

    pieces: list[torch.Tensor]
    rows: torch.Tensor
    shape: torch.Size
    order: Order

    def restored(self) -> torch.Tensor:
        """Copy what is in the pieces now to where it belongs.

        Returns:
            [batch, heads, sequence, width], in memory as [batch, sequence, heads, width].
        """
        batch, heads, length, width = self.shape
        numbers = self.order.numbers(heads, length * heads, 1, heads, restore=True)
        return torch.index_select(self.rows, 0, numbers).view(batch, length, heads, width).transpose(1, 2)
