"""AdamW over flat chunks, so that a step's own memory is a few chunks for any model.

How it works: each parameter is cut into chunks of 4 million elements. A `ChunkStream` brings a chunk's weights,
gradient and states to the device while the previous chunk is updated and the one before it is stored. On the device a
chunk is updated tile by tile: bf16 weights and their remainders are joined to fp32 masters, updated, and split again.

It replaces `torch.optim.AdamW`, whose kernel it calls, and bitsandbytes' optimizers, whose 8-bit states it shares
(`adamw_8bit.py`). It gives the same bits in every placement. The price is one kernel launch per tile and field.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

from fullft.config.placement import Placement
from fullft.model.precision import noise_for
from fullft.optim import adamw_8bit
from fullft.optim.gradients import Gradients
from fullft.optim.masters import narrow, widen
from fullft.storage.stream import ChunkStream, Field
from fullft.storage.tiers import CHUNK, Array, Storage, first_element, home_of, local_of
from fullft.storage.workers import wait_for_all
from fullft.tracing import device_type
from fullft.transforms.compilation import fuse

# Elements that a CPU updates at a time: few enough for its cache. An eager split step runs at 84 million parameters/s
# over tiles of 4 million elements, and at 1,200 to 1,400 over these. An accelerator would only launch more kernels.
CPU_TILE = 1 << 18

_ABSMAX = "_absmax"  # ends the names of the scales of 8-bit moments, one per block


class AdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay.

    With fp32 moments and weights it is torch's fused AdamW to the bit, in every placement. With split masters it is
    that of the fp32 masters.

    Args:
        groups: groups of contiguous parameters, each with its `weight_decay`.
        lr: learning rate.
        betas: decays of the first and the second moment.
        eps: added to the update's denominator.
        moments: returns the dtype of a parameter's moments; uint8 stands for blocks of 8-bit numbers.
        masters: what bf16 weights stand for: `split`, `stochastic` or `none`.
        gradient_dtype: of the gradients' sums; None for each weight's own.
        placement: where things live; None keeps all of them on the device.
        storage: makes the arrays.
        seed: of stochastic rounding.
        before_step: called before each step, which makes the device's copies of streamed weights stale.

    Attributes:
        num_steps: steps taken so far.
        missed: by a parameter's id, the steps in which it had no gradient. torch ages each parameter by its own steps.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), algorithm 2.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        moments: Callable[[nn.Parameter], torch.dtype],
        masters: str = "none",
        gradient_dtype: torch.dtype | None = None,
        placement: Placement | None = None,
        storage: Storage,
        seed: int = 0,
        before_step: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        self.parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self.placement = placement or Placement()
        self.storage = storage
        self.gradients = Gradients(
            self.parameters,
            gradient_dtype,
            self.placement.gradients,
            self.storage,
            use=lambda parameter: self._update([parameter]),
        )
        self.before_step = before_step
        self.num_steps = 0
        self.missed: dict[int, int] = {}
        self._updated: set[int] = set()
        self._moments, self._masters, self._seed = moments, masters, seed
        self._numbers = {id(parameter): number for number, parameter in enumerate(self.parameters)}
        self._groups = {id(parameter): group for group in self.param_groups for parameter in group["params"]}
        self._stream = ChunkStream(self.storage)
        self._widen, self._narrow = (fuse(function, self.storage.device) for function in (widen, narrow))
        self._scale: torch.Tensor | None = None  # what clipping multiplies the gradients with

    # ------------------------------------------------------------------------------------------ the step

    @torch.no_grad()
    def clip_gradients(self, max_norm: float) -> torch.Tensor:
        """Measure the gradients' global norm, and make the step scale them so that it is at most `max_norm`.

        The step scales gradients as it reads them, so that those on disk are not written once more.

        Args:
            max_norm: 0 only measures.

        Returns:
            The norm before scaling: a float64 scalar on the device (float32 on Apple's GPUs, which have no float64).
        """
        return self.scale_by(self.gradients.norm(), max_norm)

    def scale_by(self, norm: torch.Tensor, max_norm: float) -> torch.Tensor:
        """Make the step scale gradients of this norm to at most `max_norm`; return the norm."""
        # Source: torch.nn.utils.clip_grads_with_norm_. No wait for the device: within the limit the scale is exactly 1.
        self._scale = torch.clamp(max_norm / (norm.float() + 1e-6), max=1.0) if max_norm > 0 else None
        return norm

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: not supported; `torch.optim.Optimizer` has this argument.
        """
        self.before_step()
        self._update(self.parameters)
        self._scale = None
        self.num_steps += 1
        for key in self._groups.keys() - self._updated:
            self.missed[key] = self.missed.get(key, 0) + 1
        self._updated.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the step's gradients.

        Args:
            set_to_none: always true here; zeros would take memory.
        """
        self._scale = None
        self.gradients.clear()

    @torch.no_grad()
    def _update(self, parameters: Iterable[nn.Parameter]) -> None:
        parameters = [parameter for parameter in parameters if self.gradients.of(parameter) is not None]
        self._updated.update(map(id, parameters))  # also those of which this rank has no rows
        jobs = [job for parameter in parameters for job in self.jobs_of(parameter)]
        for tile in self.tiles_of(jobs):
            self.update_tile(tile, self._generator(tile) if self._masters == "stochastic" else None)

    def jobs_of(self, parameter: nn.Parameter) -> "Iterator[Job]":
        """Cut a parameter into chunks; one without a gradient has none.

        Args:
            parameter: one of those trained.
        """
        gradient = self.gradients.of(parameter)
        if gradient is None:
            return
        states = self.states_of(parameter)
        step = self.num_steps - self.missed.get(id(parameter), 0) + 1
        weights = home_of(parameter)
        for start in range(0, weights.numel(), CHUNK):
            count = min(CHUNK, weights.numel() - start)
            fields = {
                "weights": Field(weights, start, count, is_written=True),
                "gradient": Field(gradient, start, count, is_written=False),
            }
            for name, array in states.items():
                block = block_of(name)
                fields[name] = Field(array, start // block, -(-count // block), is_written=True)
            yield Job(parameter, start, count, step, fields)

    def tiles_of(self, jobs: "list[Job]") -> "Iterator[Tile]":
        """Stream chunks through the device, and cut each into tiles, to be updated before the next one is asked for.

        Args:
            jobs: in the order of the updates.
        """
        if not jobs:
            return
        device = self.storage.device
        size = CPU_TILE if device_type(device) == "cpu" else CHUNK
        scratch = torch.empty(2, min(size, max(job.count for job in jobs)), device=device)
        # Filled, not copied: a copy from the host would wait for the device.
        steps = {step: torch.full((), float(step), device=device) for step in {job.step for job in jobs}}
        for job, fields in zip(jobs, self._stream.run(job.fields for job in jobs), strict=True):
            for start in range(0, job.count, size):
                yield Tile(job, start, _cut(fields, start, min(start + size, job.count)), steps[job.step], scratch)

    def update_tile(self, tile: "Tile", generator: torch.Generator | None) -> None:
        """Update a tile's weights and states in place.

        Args:
            tile: from `tiles_of`.
            generator: of stochastic rounding; None draws from torch's own stream.
        """
        fields = tile.fields
        weights, gradient, moment = fields["weights"], fields["gradient"], fields["exp_avg"]
        dtype = torch.float32 if moment.dtype == torch.uint8 else moment.dtype
        master = weights if weights.dtype == dtype else tile.scratch[0, : weights.numel()]
        wide_gradient = gradient if gradient.dtype == dtype else tile.scratch[1, : gradient.numel()]
        has_master, remainder = master is not weights, fields.get("remainder")
        (self._widen if has_master else widen)(weights, remainder, gradient, self._scale, master, wide_gradient)
        self._apply(tile, master, wide_gradient)
        if has_master:
            noise = noise_for(master, generator) if self._masters == "stochastic" else None
            self._narrow(master, weights, remainder, noise)

    def _apply(self, tile: "Tile", master: torch.Tensor, gradient: torch.Tensor) -> None:
        group = self._groups[id(tile.job.parameter)]
        (beta1, beta2), moments = group["betas"], (tile.fields["exp_avg"], tile.fields["exp_avg_sq"])
        constants = {"lr": group["lr"], "beta1": beta1, "beta2": beta2, "eps": group["eps"]}
        constants["weight_decay"] = group["weight_decay"]
        if moments[0].dtype == torch.uint8:
            scales = (tile.fields["exp_avg" + _ABSMAX], tile.fields["exp_avg_sq" + _ABSMAX])
            adamw_8bit.adamw_8bit_(master, gradient, *moments, *scales, step=tile.job.step, **constants)
            return
        adamw(
            [master],
            [gradient],
            [moments[0]],
            [moments[1]],
            [],
            [tile.step.fill_(tile.job.step - 1)],  # it counts this step itself
            fused=True,
            amsgrad=False,
            maximize=False,
            **constants,
        )

    def _generator(self, tile: "Tile") -> torch.Generator:
        """Return the random stream of one tile: the same in every placement, and after every resume."""
        job = tile.job
        start = first_element(job.parameter) + job.start + tile.start
        key = (self._seed, self.num_steps, self._numbers[id(job.parameter)], start)
        seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")
        return torch.Generator(self.storage.device).manual_seed(seed)

    # ------------------------------------------------------------------------------------------ states

    def states_of(self, parameter: nn.Parameter) -> dict[str, Array]:
        """Return a parameter's states: flat arrays under their names, zeros before the first step.

        Args:
            parameter: one of those trained.

        Raises:
            DiskError: there is no room for them.
        """
        states: dict[str, Array] = self.state[parameter]
        if not states:
            # Loading may have kept the lower halves of fp32 weights, in the tier that they belong to.
            remainder = self.storage.remainders.pop(parameter, None)
            for name, (numel, dtype) in state_layout(parameter, self._moments(parameter), self._masters).items():
                loaded = remainder if name == "remainder" else None
                states[name] = self.storage.zeros(self.placement.optimizer, numel, dtype) if loaded is None else loaded
        return states

    def kinds(self) -> list[nn.Parameter]:
        """Return one parameter of each size and kind; the updates of others of its kind take the same memory."""
        kinds = {(home_of(p).numel(), p.dtype, self._moments(p), home_of(p) is local_of(p)): p for p in self.parameters}
        return list(kinds.values())

    def close(self) -> None:
        """Free the states and the gradients, and leave the parameters alone from now on."""
        wait_for_all(self.storage.device)  # which may still copy them
        self.gradients.close()
        self.state.clear()


def state_layout(parameter: nn.Parameter, moments: torch.dtype, masters: str) -> dict[str, tuple[int, torch.dtype]]:
    """Return the number of elements and the dtype of each of a parameter's states.

    Args:
        parameter: its size and dtype are read; of a sharded one, those of this rank's rows.
        moments: their dtype; uint8 for blocks of 8-bit numbers.
        masters: `split` keeps the lower halves of bf16 weights' masters.
    """
    return layout_of(local_of(parameter).numel(), parameter.dtype, moments, masters)


def layout_of(count: int, dtype: torch.dtype, moments: torch.dtype, masters: str) -> dict[str, tuple[int, torch.dtype]]:
    """Return what `state_layout` does, for any number of elements.

    Args:
        count: of a parameter, or of this rank's rows of it.
        dtype: of the parameter.
        moments: their dtype; uint8 for blocks of 8-bit numbers.
        masters: `split` keeps the lower halves of bf16 weights' masters.
    """
    layout = {"exp_avg": (count, moments), "exp_avg_sq": (count, moments)}
    if moments == torch.uint8:
        scales = (-(-count // adamw_8bit.BLOCK), torch.float32)
        layout |= {"exp_avg" + _ABSMAX: scales, "exp_avg_sq" + _ABSMAX: scales}
    if masters == "split" and dtype == torch.bfloat16:
        layout["remainder"] = (count, torch.int16)
    return layout


@dataclass(frozen=True)
class Job:
    """One chunk's update: elements `start` to `start + count` of a parameter, in its own `step`."""

    parameter: nn.Parameter
    start: int
    count: int
    step: int
    fields: Mapping[str, Field]


@dataclass(frozen=True)
class Tile:
    """A stretch of a chunk, on the device.

    Attributes:
        job: the chunk's.
        start: its first element within the chunk.
        fields: weights, gradient and states.
        step: memory for the kernel's count of steps.
        scratch: [2, elements] fp32, for a master and a gradient.
    """

    job: Job
    start: int
    fields: dict[str, torch.Tensor]
    step: torch.Tensor
    scratch: torch.Tensor


def block_of(name: str) -> int:
    """Return how many elements of a parameter one element of a field stands for.

    Args:
        name: of the field.
    """
    return adamw_8bit.BLOCK if name.endswith(_ABSMAX) else 1


def _cut(fields: dict[str, torch.Tensor], start: int, end: int) -> dict[str, torch.Tensor]:
    """Cut a tile out of a chunk; tiles start at multiples of blocks."""
    return {name: view[start // block_of(name) : -(-end // block_of(name))] for name, view in fields.items()}
