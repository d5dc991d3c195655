"""The order in which attention works on packed documents: what one operation multiplies lies together in memory.

Documents of about one length are computed together, since a small operation costs by the call. Lengths are rounded up,
since the matrix library compiles kernels for each new one and keeps hundreds of them. One operation each moves a
micro-batch's vectors into this order and back.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

Documents = tuple[tuple[int, ...], ...]  # the lengths of those in each sequence
_STEP = 32  # tokens: lengths are multiples of it, as vectorised loops like them; short ones of less


def padded(length: int) -> int:
    """Return the length that a document is computed at: at most a quarter more than its own.

    Args:
        length: its tokens.
    """
    step = min(_STEP, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step


def most_padded(tokens: int) -> int:
    """Return how many positions any documents of so many tokens are computed at, at most.

    Args:
        tokens: of all of them.
    """
    return tokens + tokens // 4


class Document(NamedTuple):
    """A row of the batch, the position of the first token there, and how many there are."""

    row: int
    start: int
    length: int


class Span(NamedTuple):
    """The same positions of some documents that are computed at one length.

    Attributes:
        group: number of these documents.
        documents: each is padded with copies of its last token, which no token sees.
        length: that they are computed at.
        first: of the positions, counted within a document.
        end: behind the last of them.
    """

    group: int
    documents: Sequence[Document]
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
    """Where the vectors of a micro-batch lie: documents are grouped, and cut into blocks.

    Args:
        documents: the lengths of those in each sequence.
        most_queries: positions of a document in a block, at most.
        most_together: tokens of a group of several documents, at most.

    Attributes:
        by_group: the order of vectors by groups of documents.
        by_block: their order by blocks of documents, in the order of the computation: the last block of a document
            first.
    """

    def __init__(self, documents: Documents, most_queries: int, most_together: int) -> None:
        groups = list(_groups(documents, most_together))
        blocks = [block for group in groups for block in _blocks(group, most_queries)]
        self.by_group = Order(groups)
        self.by_block = Order(blocks) if blocks != groups else self.by_group


def _groups(documents: Documents, most_together: int) -> Iterator[Span]:
    by_length: dict[int, list[Document]] = {}
    for row, lengths in enumerate(documents):
        for length, end in zip(lengths, accumulate(lengths), strict=True):
            by_length.setdefault(padded(length), []).append(Document(row, end - length, length))
    group = 0
    for length, alike in by_length.items():
        count = max(1, most_together // length)
        for first in range(0, len(alike), count):
            yield Span(group, alike[first : first + count], length, 0, length)
            group += 1


def _blocks(group: Span, most_queries: int) -> Iterator[Span]:
    for first in reversed(range(0, group.length, most_queries)):
        yield group._replace(first=first, end=min(first + most_queries, group.length))


class Order:
    """Vectors span by span, in each by document, head and position.

    Attributes:
        spans: what the vectors are of, in their order.
        bounds: how many positions, padding included, are before each span, and in all.
    """

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = spans
        self.bounds = [0, *accumulate(len(span.documents) * span.size for span in spans)]
        # All layers of a micro-batch ask for the same indices: some bytes per vector of one layer, until the next one.
        self._known: dict[tuple[int, ...], NDArray[Any]] = {}

    def gather(self, vectors: torch.Tensor, key_heads: int, *, zero_padding: bool = False) -> "Gathered":
        """Copy vectors into this order.

        Args:
            vectors: [batch, heads, sequence, width], in memory in whatever order.
            key_heads: that the keys have; heads that share one of these follow each other.
            zero_padding: have zeros behind a document's last token, rather than copies of it.
        """
        batch, heads, length, width = vectors.shape
        if vectors.stride(3) != 1 or any(stride % width for stride in vectors.stride()[:3]):
            vectors = vectors.contiguous()
        of_row, of_head, of_position = (stride // width for stride in vectors.stride()[:3])
        count = (batch - 1) * of_row + (heads - 1) * of_head + (length - 1) * of_position + 1
        in_memory = vectors.as_strided((count, width), (width, 1))
        indices = torch.from_numpy(self.indices(heads, of_row, of_head, of_position))
        # As many as any documents could take, for the plan does not know them.
        rows = vectors.new_empty(most_padded(batch * length) * heads, width)
        torch.index_select(in_memory, 0, indices, out=rows[: len(indices)])
        if zero_padding and len(padding := self.padding(heads)):
            rows.index_fill_(0, torch.from_numpy(padding), 0)
        return Gathered(rows, vectors.shape, key_heads, self)

    def indices(self, heads: int, of_row: int, of_head: int, of_position: int) -> NDArray[np.int32]:
        """Return where in memory the vectors lie, in this order.

        Args:
            heads: of the vectors.
            of_row: vectors in memory from one row of the batch to the next.
            of_head: from one head to the next.
            of_position: from one position to the next.
        """
        key = (heads, of_row, of_head, of_position)
        if key not in self._known:
            of_heads = np.arange(heads, dtype=np.int32)[:, None] * of_head
            self._known[key] = np.concatenate(
                [
                    (row * of_row + of_heads + (start + np.minimum(positions, length - 1)) * of_position).ravel()
                    for span in self.spans
                    for positions in [np.arange(span.first, span.end, dtype=np.int32)]
                    for row, start, length in span.documents
                ]
            )
        return self._known[key]

    def padding(self, heads: int) -> NDArray[np.int64]:
        """Return where in this order there is padding, a copy of the last token's vector.

        Args:
            heads: of the vectors.
        """
        key = (heads,)
        if key not in self._known:
            behind = [
                np.tile(np.arange(span.first, span.end) >= document.length, heads)
                for span in self.spans
                for document in span.documents
            ]
            self._known[key] = np.flatnonzero(np.concatenate(behind))
        return self._known[key]

    def places(self, heads: int, length: int) -> NDArray[np.int32]:
        """Return where in this order the vectors lie, in the order of [batch, sequence, heads]."""
        key = (heads, length)
        if key not in self._known:
            indices = self.indices(heads, length * heads, 1, heads)
            own = np.delete(np.arange(len(indices), dtype=np.int32), self.padding(heads))
            self._known[key] = places = np.empty_like(own)
            places[indices[own]] = own
        return self._known[key]


class Gathered(NamedTuple):
    """Vectors in an order of their own.

    Attributes:
        rows: all of them, [vectors, width].
        shape: where they come from, [batch, heads, sequence, width].
        key_heads: that the keys have.
        order: which one it is.
    """

    rows: torch.Tensor
    shape: torch.Size
    key_heads: int
    order: Order

    def span(self, number: int) -> torch.Tensor:
        """View the vectors of the span of that number: [documents, heads, positions, width]."""
        return self._rows(number).view(len(self.order.spans[number].documents), self.shape[1], -1, self.shape[3])

    def piece(self, number: int) -> torch.Tensor:
        """View them as [documents × key heads, vectors that share one, width]."""
        return self._rows(number).view(len(self.order.spans[number].documents) * self.key_heads, -1, self.shape[3])

    def _rows(self, number: int) -> torch.Tensor:
        first, end = self.order.bounds[number : number + 2]
        return self.rows[self.shape[1] * first : self.shape[1] * end]

    def restored(self) -> torch.Tensor:
        """Copy what is in them now to where it belongs.

        Returns:
            [batch, heads, sequence, width], in memory as [batch, sequence, heads, width].
        """
        batch, heads, length, width = self.shape
        places = torch.from_numpy(self.order.places(heads, length))
        return torch.index_select(self.rows, 0, places).view(batch, length, heads, width).transpose(1, 2)
