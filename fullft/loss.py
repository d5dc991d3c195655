"""The loss: cross entropy summed over target tokens, in chunks.

Owns the shift by one token, the mask and the dtype of the softmax. Dividing by the number of target tokens of the
global batch is the loop's business: a mean taken here would weigh micro-batches of unlike length alike.
"""

import torch
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint

IGNORED = -100
CHUNK_TOKENS = 256


def summed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum the cross entropy of every target token, in fp32 (fp64 logits stay fp64).

    The softmax runs over `CHUNK_TOKENS` positions at a time and is recomputed in backward, so that only the logits
    themselves are kept, never an fp32 copy of all of them.

    Args:
        logits: [batch, sequence, vocabulary], any floating dtype; position t predicts token t + 1.
        labels: [batch, sequence] int64, the token ids themselves; -100 is ignored, and so is position 0.

    Returns:
        A scalar, in nats.
    """
    # The labels are shifted, not the logits: a slice of these would have to be copied.
    predictions = logits.flatten(0, 1)
    targets = pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    total = torch.zeros((), dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    sizes = _chunk_sizes(len(targets))
    for chunk, chunk_targets in zip(predictions.split(sizes), targets.split(sizes), strict=True):
        total = total + _recomputed_loss(chunk, chunk_targets, total.dtype)
    return total


def _chunk_sizes(count: int) -> list[int]:
    return [min(CHUNK_TOKENS, count - start) for start in range(0, count, CHUNK_TOKENS)]


def _recomputed_loss(logits: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # No dropout in here: there is no random state to preserve.
    loss: torch.Tensor = checkpoint(_chunk_loss, logits, targets, dtype, use_reentrant=False, preserve_rng_state=False)
    return loss


def _chunk_loss(logits: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return cross_entropy(logits.to(dtype), targets, ignore_index=IGNORED, reduction="sum")
