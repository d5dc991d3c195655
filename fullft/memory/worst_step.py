"""The worst step of a run, taken once before it: it shows within a minute what would fail at hour three.

Owns that step, which is `train.py`'s with the largest micro-batches and without consequences. The tracker watches it on
real tensors, the planner on fake ones.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from fullft.data.micro_batch import MicroBatch
from fullft.memory.tracker import MemoryTracker, Profile
from fullft.model.loss import SummedCrossEntropy
from fullft.optim.adamw import AdamW


def take_worst_step(
    model: PreTrainedModel,
    optimizer: AdamW,
    micro_batches: Sequence[MicroBatch],
    evaluation: MicroBatch | None,
    autocast: torch.autocast,
    max_grad_norm: float,
    *,
    pretend_earlier: bool = False,
) -> Profile:
    """Take a whole step under the tracker, with the optimizer's states in place as they are from the second step on.

    The optimizer only rehearses: no weight and no state changes, and the random state is put back. A run goes on from
    here as if nothing had happened.

    Args:
        model: in training mode, on its device.
        optimizer: without states yet.
        micro_batches: on the CPU; two stand for any number, since the second one finds gradients already there.
        evaluation: the largest held-out micro-batch.
        autocast: the context that training computes in.
        max_grad_norm: as in training.
        pretend_earlier: have gradients there before the first of `micro_batches`, as accumulation would.

    Returns:
        The live bytes, event by event.
    """
    summed_cross_entropy = SummedCrossEntropy(model)
    decoder = summed_cross_entropy.decoder
    with _without_consequences(model, optimizer):
        with MemoryTracker(model, optimizer) as tracker:
            if pretend_earlier:
                tracker.earlier_micro_batch()
            for micro_batch in micro_batches:
                micro_batch = _copy(micro_batch, model.device)
                tracker.forward({**micro_batch.inputs, "labels": micro_batch.labels})
                with autocast:
                    outputs = decoder(**micro_batch.inputs, use_cache=False)
                    loss = summed_cross_entropy(outputs, micro_batch) / micro_batch.num_target_tokens
                del outputs
                tracker.backward()
                loss.backward()
                del loss
            tracker.optimizer_step()
            optimizer.clip_gradients(max_norm=max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            if evaluation is not None:
                micro_batch = _copy(evaluation, model.device)
                tracker.evaluation({**micro_batch.inputs, "labels": micro_batch.labels})
                model.eval()
                with torch.no_grad(), autocast:
                    summed_cross_entropy(decoder(**micro_batch.inputs, use_cache=False), micro_batch)
                model.train()
        return tracker.profile()


@contextmanager
def _without_consequences(model: PreTrainedModel, optimizer: AdamW) -> Iterator[None]:
    """Leave weights, learning rates, states, the absence of gradients, and the random state as they were."""
    rates = [group["lr"] for group in optimizer.param_groups]
    accelerators = [] if model.device.type == "cpu" else [model.device]
    kind = model.device.type if accelerators else "cuda"
    with torch.random.fork_rng(accelerators, device_type=kind):  # dropout draws from it
        try:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            with optimizer.rehearsal():
                yield
        finally:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate


def _copy(micro_batch: MicroBatch, device: torch.device) -> MicroBatch:
    """Copy a micro-batch to the device, and on a CPU too: there as elsewhere one is alive at a time."""
    inputs = {name: tensor.to(device, copy=True) for name, tensor in micro_batch.inputs.items()}
    labels = micro_batch.labels.to(device, copy=True)
    return MicroBatch(inputs, labels, micro_batch.num_tokens, micro_batch.num_target_tokens)
