"""What is known of positions without reading them: where documents lie, as the CPU that joined them says.

A value that is read from a device waits for all that the device still has to do. Operators get positions, as families
hand them on. What the micro-batch says of its documents is found again by the memory that these positions lie in: in
every layer, in a recomputation and in a compiled graph. Positions of other origin, such as those of a probe, are read.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.utils.weak import WeakIdKeyDictionary
from transformers import masking_utils

from fullft.data.micro_batch import Documents, MicroBatch
from fullft.tracing import is_tracing

_known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # the documents, by the storage of their positions


@contextmanager
def knowing_documents(micro_batch: MicroBatch) -> Iterator[None]:
    """Make known where a micro-batch's documents lie, and keep transformers from asking the device within the body.

    Its masks ask whether positions restart. Where they are left to the model, they do not.

    Args:
        micro_batch: on the model's device. What is said of its positions holds as long as they are there.
    """
    positions, documents = micro_batch.inputs.get("position_ids"), micro_batch.documents
    if positions is not None and documents is None:
        yield  # only the positions say it
        return
    if positions is not None and not is_tracing():
        _known[positions.untyped_storage()] = documents
    asking = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = (lambda _: None) if positions is None else _number_documents
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = asking


def _number_documents(positions: torch.Tensor) -> torch.Tensor:
    """Return [batch, sequence], the number of each token's document within its row, as transformers numbers them."""
    return (torch.diff(positions, prepend=positions[:, :1] - 1) != 1).cumsum(-1)


def documents_of(positions: torch.Tensor | None, batch: int, length: int, device: torch.device) -> Documents:
    """Return the documents that begin where positions are 0, row after row.

    Args:
        positions: as in `lengths_of`.
        batch: rows.
        length: tokens of each.
        device: of the bounds.
    """
    known = _said_of(positions, batch, length)
    return Documents.of(lengths_of(positions, batch, length), device) if known is None else known


def lengths_of(positions: torch.Tensor | None, batch: int, length: int) -> Sequence[int]:
    """Return the tokens of the documents that begin where positions are 0, row after row.

    While tracing there is one document per row, the largest that can be.

    Args:
        positions: [1 or batch, sequence]; None for one document per row.
        batch: rows.
        length: tokens of each.
    """
    if positions is None or is_tracing():
        return [length] * batch
    if (known := _said_of(positions, batch, length)) is not None:
        return known.lengths
    starts = positions.expand(batch, -1) == 0
    starts[:, 0] = True
    bounds = [*torch.nonzero(starts.flatten())[:, 0].tolist(), batch * length]  # waits for the device
    return [end - start for start, end in zip(bounds, bounds[1:], strict=False)]


def _said_of(positions: torch.Tensor | None, batch: int, length: int) -> Documents | None:
    """Return what a micro-batch says of its positions, if these are its own."""
    if positions is None or is_tracing():
        return None
    known: Documents | None = _known.get(positions.untyped_storage())
    is_its_own = known is not None and positions.shape == (batch, length) and known.num_tokens == batch * length
    return known if is_its_own else None
