"""Vectors come in the order that is said, from whatever memory they lie in, and go back to where they belong."""

import pytest
import torch

from fullft.attention.order import Layout, most_padded, padded

DOCUMENTS = ((3, 5, 3, 1, 9), (17, 4))  # 9 and 17 are worked on as 10 and 20
BATCH, HEADS, KEY_HEADS, LENGTH, WIDTH = 2, 4, 2, 21, 3

# The same [batch, heads, sequence, width] in memory as projections give it, as a copy, out of one projection of all,
# behind other positions, of one sequence that stands for both, with a gap behind each vector, and as a sum's gradient.
MEMORY = {
    "positions": torch.randn(BATCH, LENGTH, HEADS, WIDTH).transpose(1, 2),
    "heads": torch.randn(BATCH, HEADS, LENGTH, WIDTH),
    "fused": torch.randn(BATCH, LENGTH, 3 * HEADS, WIDTH)[:, :, HEADS : 2 * HEADS].transpose(1, 2),
    "behind": torch.randn(BATCH, HEADS, LENGTH + 1, WIDTH)[:, :, 1:],
    "expanded": torch.randn(1, HEADS, LENGTH, WIDTH).expand(BATCH, -1, -1, -1),
    "gaps": torch.randn(BATCH, HEADS, LENGTH, WIDTH + 1)[..., :WIDTH],
    "sum": torch.randn(1).expand(BATCH, HEADS, LENGTH, WIDTH),
}


@pytest.mark.parametrize("most_queries", [4, 2])  # of 2 some blocks have no token at all
@pytest.mark.parametrize("vectors", MEMORY.values(), ids=MEMORY.keys())
def test_vectors_come_block_by_block_and_go_back(vectors: torch.Tensor, most_queries: int) -> None:
    layout = Layout(DOCUMENTS, most_queries=most_queries, most_together=6)
    gathered = layout.by_block.gather(vectors, KEY_HEADS)
    for number, block in enumerate(layout.by_block.spans):
        piece = gathered.piece(number)
        expected = [
            vectors[row, head : head + HEADS // KEY_HEADS, positions].flatten(0, 1)
            for row, start, length in block.documents
            for positions in [[start + min(each, length - 1) for each in range(block.first, block.end)]]
            for head in range(0, HEADS, HEADS // KEY_HEADS)
        ]
        assert torch.equal(piece, torch.stack(expected))
        piece.add_(1)
        num_tokens = max(0, min(length for *_, length in block.documents) - block.first)
        piece.unflatten(1, (-1, block.size))[:, :, num_tokens:] = 0
    restored = gathered.restored()
    assert torch.equal(restored, vectors + 1)
    assert restored.transpose(1, 2).is_contiguous()


def test_padding_of_blocks_can_be_zeros() -> None:
    layout = Layout(DOCUMENTS, most_queries=4, most_together=6)
    gathered = layout.by_block.gather(torch.ones(BATCH, HEADS, LENGTH, WIDTH), KEY_HEADS, zero_padding=True)
    pieces = [gathered.piece(number) for number in range(len(layout.by_block.spans))]
    assert sum(piece.numel() for piece in pieces) > BATCH * HEADS * LENGTH * WIDTH
    assert sum(piece.sum().item() for piece in pieces) == BATCH * HEADS * LENGTH * WIDTH
    for piece, block in zip(pieces, layout.by_block.spans, strict=True):
        for document, its_own in zip(block.documents, piece.chunk(len(block.documents)), strict=True):
            own = its_own.unflatten(1, (-1, block.size))[..., max(0, document.length - block.first) :, :]
            assert not own.any()


def test_no_length_grows_by_more_than_a_quarter() -> None:
    lengths = range(1, 3000)
    assert all(length <= padded(length) <= most_padded(length) for length in lengths)
    assert len({padded(length) for length in lengths}) < len(lengths) / 25
    assert most_padded(sum(lengths)) >= sum(map(padded, lengths))


def test_keys_come_by_documents_of_about_one_length() -> None:
    documents = ((3, 5, 3, 10), (5, 7, 9))
    vectors = torch.randn(BATCH, LENGTH, KEY_HEADS, WIDTH).transpose(1, 2)
    of_twenty, of_six = (Layout(documents, most_queries=4, most_together=most) for most in (20, 6))
    gathered = of_twenty.by_group.gather(vectors, KEY_HEADS)
    assert torch.equal(gathered.piece(0), torch.cat([vectors[0, :, 0:3], vectors[0, :, 8:11]]))
    assert torch.equal(gathered.piece(1), torch.cat([vectors[0, :, 3:8], vectors[1, :, 0:5]]))
    of_nine = torch.cat([vectors[1, :, 12:21], vectors[1, :, 20:21]], 1)  # its last token twice, for it goes with ten
    assert torch.equal(gathered.piece(2), torch.cat([vectors[0, :, 11:21], of_nine]))
    assert {block.group for block in of_twenty.by_block.spans} == set(range(4))
    # Two of 5 tokens are too many for six, and one of 7 is worked on all the same.
    gathered = of_six.by_group.gather(vectors, KEY_HEADS)
    assert [gathered.piece(number).shape[0] // KEY_HEADS for number in range(6)] == [2, 1, 1, 1, 1, 1]


def test_blocks_of_a_document_come_last_ones_first() -> None:
    blocks = Layout(((9, 2),), most_queries=4, most_together=100).by_block.spans
    assert [(block.first, block.end, block.is_whole) for block in blocks] == [
        (8, 10, False),
        (4, 8, False),
        (0, 4, False),
        (0, 2, True),
    ]
