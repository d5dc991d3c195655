"""The rehearsal of an optimizer's step: it needs all the step's memory, and changes nothing.

The worst step is taken with it, on real tensors before a run and on fake ones in a plan.
"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice

import torch
from torch import nn

from fullft.optim.adamw import AdamW, Job
from fullft.storage.tiers import is_on_host


class Rehearsal:
    """Takes the place of an optimizer that has taken no step yet. A context manager.

    A few tiles of a few chunks of a few parameters are updated, with gradients of zero and a learning rate of 0. What
    lives on the host or on disk is not written back.

    Args:
        optimizer: its states are made when the rehearsal begins.
    """

    def __init__(self, optimizer: AdamW) -> None:
        self._optimizer = optimizer
        self._examples = optimizer.kinds()
        self._example_ids = {id(parameter) for parameter in self._examples}

    def __enter__(self) -> "Rehearsal":
        """Begin: make the states, as they are there from the second step on."""
        optimizer = self._optimizer
        self._rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        self._use, optimizer.gradients.use = optimizer.gradients.use, lambda parameter: self._update([parameter])
        for parameter in optimizer.parameters:
            optimizer.states_of(parameter)
        return self

    def __exit__(self, *_: object) -> None:
        """End: the optimizer is as it was, with states of zeros."""
        optimizer = self._optimizer
        optimizer.gradients.use = self._use
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
        optimizer.zero_grad()
        for states in optimizer.state.values():
            for array in states.values():  # 8-bit blocks have several codes for zero, and those on the device changed
                if isinstance(array, torch.Tensor) and array.dtype == torch.uint8 and not is_on_host(array):
                    array.zero_()

    @torch.no_grad()
    def clip_gradients(self, max_norm: float) -> torch.Tensor:
        """Do as the optimizer does, with one tile of one gradient of each kind.

        Args:
            max_norm: 0 only measures.
        """
        return self._optimizer.scale_by(self._optimizer.gradients.norm(sample=self._examples), max_norm)

    @torch.no_grad()
    def step(self) -> None:
        """Update a tile of one parameter of each kind."""
        self._optimizer.before_step()
        self._update(self._optimizer.parameters)

    def zero_grad(self) -> None:
        """Drop the step's gradients."""
        self._optimizer.zero_grad()

    @torch.no_grad()
    def _update(self, parameters: Iterable[nn.Parameter]) -> None:
        # The first chunk is the largest: its stream takes as much memory for one chunk as for all.
        jobs = [
            _unwritten(job)
            for parameter in parameters
            if id(parameter) in self._example_ids
            for job in islice(self._optimizer.jobs_of(parameter), 1)
        ]
        for tile in self._optimizer.tiles_of(jobs):
            if tile.start == 0:
                tile.fields["gradient"].zero_()
                self._optimizer.update_tile(tile, generator=None)


def _unwritten(job: Job) -> Job:
    return replace(job, fields={name: replace(field, is_written=False) for name, field in job.fields.items()})
