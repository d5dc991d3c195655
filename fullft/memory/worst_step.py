"""The worst step of a run, taken once before it: it shows within a minute what would fail at hour three.

It makes the calls of `train.py`'s loop in their order, with the largest micro-batches and without consequences; a test
compares the two files. The tracker watches it on real tensors, the plan on fake ones.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from fullft.data.micro_batch import MicroBatch
from fullft.memory.profile import Profile
from fullft.memory.tracker import MemoryTracker
from fullft.model.loss import LossSum
from fullft.model.probing import probing
from fullft.optim.adamw import AdamW
from fullft.optim.rehearsal import Rehearsal


def take_worst_step(
    model: PreTrainedModel,
    loss_sum: LossSum,
    optimizer: AdamW,
    micro_batches: Sequence[MicroBatch],
    evaluation: MicroBatch | None,
    autocast: torch.autocast,
    max_grad_norm: float,
    *,
    pretend_earlier: bool = False,
) -> Profile:
    """Take a whole step under the tracker, with the optimizer's states in place as they are from the second step on.

    The optimizer only rehearses: no weight and no state changes, and the random state is restored. A run continues from
    here as if nothing had happened.

    Args:
        model: in training mode, on its device.
        loss_sum: of the model.
        optimizer: has taken no step.
        micro_batches: on the CPU. Two stand for any number, since the second one finds gradients already there.
        evaluation: the largest held-out micro-batch.
        autocast: the context that training computes in.
        max_grad_norm: as in training.
        pretend_earlier: begin with gradients of an earlier micro-batch in place, as accumulation would.

    Returns:
        The live bytes, event by event.
    """
    micro_batches = [
        replace(micro_batch, is_last=number == len(micro_batches))
        for number, micro_batch in enumerate(micro_batches, 1)
    ]
    with _random_state_restored(model.device), Rehearsal(optimizer) as rehearsal:
        with MemoryTracker(model, optimizer) as tracker:
            if pretend_earlier:
                tracker.earlier_micro_batch()
            for micro_batch in micro_batches:
                micro_batch = _copy(micro_batch, model.device)
                tracker.forward(micro_batch)
                with autocast:
                    micro_loss = loss_sum(micro_batch) / micro_batch.num_target_tokens
                tracker.backward()
                micro_loss.backward()
                del micro_loss
            tracker.optimizer_step()
            rehearsal.clip_gradients(max_norm=max_grad_norm)
            rehearsal.step()
            rehearsal.zero_grad()
            if evaluation is not None:
                micro_batch = _copy(evaluation, model.device)
                tracker.evaluation(micro_batch)
                with probing(model), autocast:
                    loss_sum(micro_batch)
        return tracker.profile()


def _random_state_restored(device: torch.device) -> AbstractContextManager[None]:
    """Restore the state that dropout draws from."""
    on_cpu = device.type == "cpu"
    return torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type)


def _copy(micro_batch: MicroBatch, device: torch.device) -> MicroBatch:
    """Copy a micro-batch to the device, and on a CPU too: there as elsewhere one exists at a time."""
    return micro_batch.to(device, copy=True)
