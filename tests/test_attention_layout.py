"""Vectors come in the order that is said, from whatever memory they lie in, and go back to where they belong."""

import pytest
import torch

from fullft.attention_layout import Layout

DOCUMENTS = ((3, 5, 3, 1), (5, 7))
BATCH, HEADS, KEY_HEADS, LENGTH, WIDTH = 2, 4, 2, 12, 3

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


@pytest.mark.parametrize("vectors", MEMORY.values(), ids=MEMORY.keys())
def test_vectors_come_block_by_block_and_go_back(vectors: torch.Tensor) -> None:
    layout = Layout(DOCUMENTS, most_queries=4, most_together=6)
    gathered = layout.queries.gather(vectors, KEY_HEADS)
    for number, block in enumerate(layout.blocks):
        piece = gathered.piece(number)
        expected = [
            vectors[row, head : head + HEADS // KEY_HEADS, start + block.first : start + block.end].flatten(0, 1)
            for row, start in block.starts
            for head in range(0, HEADS, HEADS // KEY_HEADS)
        ]
        assert torch.equal(piece, torch.stack(expected))
        piece.add_(1)
    restored = gathered.restored()
    assert torch.equal(restored, vectors + 1)
    assert restored.transpose(1, 2).is_contiguous()


def test_keys_come_by_documents_of_one_length() -> None:
    vectors = torch.randn(BATCH, LENGTH, KEY_HEADS, WIDTH).transpose(1, 2)
    of_ten, of_six = (Layout(DOCUMENTS, most_queries=4, most_together=most) for most in (10, 6))
    gathered = of_ten.keys.gather(vectors, KEY_HEADS)
    assert torch.equal(gathered.piece(0), torch.cat([vectors[0, :, 0:3], vectors[0, :, 8:11]]))
    assert torch.equal(gathered.piece(1), torch.cat([vectors[0, :, 3:8], vectors[1, :, 0:5]]))
    assert {block.group for block in of_ten.blocks} == set(range(4))
    # Two of 5 tokens are too many for six, and one of 7 is worked on all the same.
    gathered = of_six.keys.gather(vectors, KEY_HEADS)
    assert [gathered.piece(number).shape[0] // KEY_HEADS for number in range(5)] == [2, 1, 1, 1, 1]


def test_blocks_of_a_document_come_last_ones_first() -> None:
    blocks = Layout(((9, 2),), most_queries=4, most_together=100).blocks
    assert [(block.first, block.end, block.is_whole) for block in blocks] == [
        (8, 9, False),
        (4, 8, False),
        (0, 4, False),
        (0, 2, True),
    ]
