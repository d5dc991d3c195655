"""Global batches of uneven rows, and their gradients: as train.py takes them, and in plain torch."""

from dataclasses import replace

import numpy as np
import torch
from datasets import Dataset
from models import VOCABULARY, make_config
from transformers import PreTrainedModel

from fullft.data.batches import Batches
from fullft.data.micro_batch import IGNORED, MicroBatch
from fullft.model.loss import LossSum

Gradients = dict[str, torch.Tensor]


def make_rows(lengths: list[int], seed: int = 0) -> Dataset:
    """Make rows of random tokens whose first third is a prompt."""
    random = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        ids = random.integers(1, VOCABULARY, length).tolist()
        labels = [IGNORED if position < max(1, length // 3) else token for position, token in enumerate(ids)]
        targets = sum(label != IGNORED for label in labels)
        rows.append({"input_ids": ids, "labels": labels, "num_tokens": length, "num_target_tokens": targets})
    return Dataset.from_list(rows)


UNEVEN = make_rows([3, 31, 8, 17, 5, 29, 11, 4, 23, 9, 14, 2, 26, 7, 19, 12])


def our_gradients(
    model: PreTrainedModel, rows: Dataset, *, autocast: bool = False, flat: bool = False, **options: object
) -> tuple[float, Gradients]:
    """Return the loss and the gradients of one global batch, as train.py's loop takes them."""
    config = replace(make_config(max_length=64, **options), isolates_documents=flat)
    batch, loss_sum = Batches(rows, config, pad_token_id=0).global_batch(1), LossSum(model)
    model.zero_grad()
    loss = 0.0
    for micro_batch in batch:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            micro_loss = loss_sum(micro_batch) / batch.num_target_tokens
        micro_loss.backward()
        loss += micro_loss.item()
    return loss, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def reference_gradients(model: PreTrainedModel, rows: Dataset) -> tuple[float, Gradients]:
    """Return the same by plain torch: every row alone, without padding, and one mean over all target tokens."""
    model.zero_grad()
    losses = []
    for row in rows:
        log_probabilities = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0].log_softmax(-1)
        for position in range(1, len(row["input_ids"])):
            if row["labels"][position] != IGNORED:
                losses.append(-log_probabilities[position - 1, row["labels"][position]])
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def tolerance(family: str) -> float:
    """Return the relative tolerance. Gemma-2 attends eagerly, with a softmax in fp32 for any weights."""
    return 1e-7 if family == "gemma2" else 1e-12


def largest_difference(ours: Gradients, theirs: Gradients) -> float:
    """Return the largest difference, relative to the largest gradient of its parameter."""
    return max(((ours[n] - g).abs().max() / g.abs().max().clamp(min=1e-12)).item() for n, g in theirs.items())


def make_micro_batch(sequences: int, length: int) -> MicroBatch:
    """Make random tokens, of which two in three are targets."""
    torch.manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (sequences, length))
    labels = ids.clone()
    labels[:, ::3] = IGNORED
    return MicroBatch.of(ids, labels)


def whole_loss(model: PreTrainedModel, micro_batch: MicroBatch) -> torch.Tensor:
    """Sum the cross entropy by plain torch, on all logits."""
    logits = model(**micro_batch.inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
    targets = micro_batch.labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def gradients_of(model: PreTrainedModel, loss: torch.Tensor) -> Gradients:
    model.zero_grad()
    loss.backward()
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    return found
