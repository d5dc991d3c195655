"""AdamW, streamed: the update runs over flat chunks, so that its own memory is a chunk's, never a tensor's.

Owns the states and the step: fp32 or 8-bit moments, weights that are updated as they are or through an fp32 master
(`master_weights.py`), all of it wherever `--offload` puts it. The arithmetic itself is torch's fused kernel, or that of
`blockwise.py`.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fullft.model.precision import join, round_stochastically, split
from fullft.optim import adamw_8bit as blockwise
from fullft.optim.gradients import Gradients
from fullft.storage.tiers import CHUNK, Array, ChunkStream, Field, Storage, home_of

# Elements that a CPU updates at a time: few enough for its cache, where the passes over them cost next to nothing. An
# accelerator would only launch more kernels.
CPU_TILE = 1 << 18


@dataclass(frozen=True)
class Placement:
    """Where things live: `device`, `host` or `disk`; gradients may also be `released`, used up within backward."""

    parameters: str = "device"
    gradients: str = "device"
    optimizer: str = "device"


_ABSMAX = "_absmax"  # ends the names of the scales of 8-bit moments, one per block


class AdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay.

    With fp32 moments and weights it is torch's fused AdamW to the bit, in every placement, and with split masters that
    of the fp32 masters.

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
    ) -> None:
        """Keep no states yet.

        Args:
            groups: of contiguous parameters, with `weight_decay` each.
            lr: learning rate.
            betas: decays of the first and the second moment.
            eps: added to the update's denominator.
            moments: the dtype of a parameter's moments; uint8 for blocks of 8-bit numbers.
            masters: of bf16 weights: `split`, `stochastic` or `none`.
            gradient_dtype: of the gradients' sums; None for each weight's own.
            placement: where things live; None keeps all of them on the device.
            storage: makes arrays.
            seed: of stochastic rounding.
        """
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
        self.num_steps = 0
        self.missed: dict[int, int] = {}  # steps in which a parameter, by its id, has had no gradient
        self._updated: set[int] = set()
        self._moments, self._masters, self._seed = moments, masters, seed
        self._numbers = {id(parameter): number for number, parameter in enumerate(self.parameters)}
        self._groups = {id(parameter): group for group in self.param_groups for parameter in group["params"]}
        self._stream = ChunkStream(self.storage.device)
        self._is_rehearsal = False
        self._scale: torch.Tensor | None = None  # what clipping multiplies the gradients with

    # ------------------------------------------------------------------------------------------ the step

    @torch.no_grad()
    def clip_gradients(self, max_norm: float) -> torch.Tensor:
        """Measure the gradients' global norm, and have the step scale them so that it is at most `max_norm`.

        The step scales gradients as it reads them, so that those on disk are not written once more.

        Args:
            max_norm: 0 only measures.

        Returns:
            The norm before scaling: a float64 scalar on the device (float32 on Apple's, which has no float64).
        """
        norm = self.gradients.norm(only=self._examples() if self._is_rehearsal else None)
        # Source: torch.nn.utils.clip_grads_with_norm_. No host sync: within the limit it is exactly 1.
        self._scale = torch.clamp(max_norm / (norm.float() + 1e-6), max=1.0) if max_norm > 0 else None
        return norm

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: not taken; `torch.optim.Optimizer` has it.
        """
        self._update(self.parameters)
        self._scale = None
        if not self._is_rehearsal:
            self.num_steps += 1
            for key in self._groups.keys() - self._updated:
                self.missed[key] = self.missed.get(key, 0) + 1
        self._updated.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the step's gradients.

        Args:
            set_to_none: always; zeros would take memory.
        """
        self.gradients.clear()

    @torch.no_grad()
    def _update(self, parameters: Iterable[nn.Parameter]) -> None:
        """Update parameters chunk by chunk, and each chunk tile by tile."""
        if self._is_rehearsal:
            examples = {id(parameter) for parameter in self._examples()}
            parameters = [parameter for parameter in parameters if id(parameter) in examples]
        jobs = [job for parameter in parameters for job in self._jobs(parameter)]
        if not jobs:
            return
        device = self.storage.device
        tile = CPU_TILE if device.type == "cpu" else CHUNK
        scratch = torch.empty(2, min(tile, max(job.count for job in jobs)), device=device)
        # torch counts the steps of each parameter apart: those without a gradient do not age.
        steps = {job.step: torch.tensor(float(job.step), device=device) for job in jobs}
        for job, fields in zip(jobs, self._stream.run(job.fields for job in jobs), strict=True):
            if self._is_rehearsal:
                fields["gradient"].zero_()
            for start in range(0, tile if self._is_rehearsal else job.count, tile):
                work = _Tile(job, start, _cut(fields, start, min(start + tile, job.count)), steps[job.step])
                self._update_tile(work, scratch)

    def _examples(self) -> list[nn.Parameter]:
        """Give one parameter of each size and kind: the others' updates take the same memory, one after the other."""
        kinds = {(p.numel(), p.dtype, self._moments(p), home_of(p) is p): p for p in self.parameters}
        return list(kinds.values())

    def _jobs(self, parameter: nn.Parameter) -> "Iterator[_Job]":
        """Cut a parameter that has a gradient into chunks."""
        gradient = self.gradients.of(parameter)
        if gradient is None:
            return
        states = self.states_of(parameter)
        self._updated.add(id(parameter))
        step = self.num_steps - self.missed.get(id(parameter), 0) + 1
        starts = range(0, parameter.numel(), CHUNK)
        if self._is_rehearsal:
            starts = starts[:1]  # the largest: its stream takes as much memory for one chunk as for all
        for start in starts:
            count = min(CHUNK, parameter.numel() - start)
            fields = {
                "weights": Field(home_of(parameter), start, count, is_written=not self._is_rehearsal),
                "gradient": Field(gradient, start, count, is_written=False),
            }
            for name, array in states.items():
                block = _block(name)
                fields[name] = Field(array, start // block, -(-count // block), is_written=not self._is_rehearsal)
            yield _Job(parameter, start, count, step, fields)

    def _update_tile(self, tile: "_Tile", scratch: torch.Tensor) -> None:
        fields = tile.fields
        weights, gradient, moment = fields["weights"], fields["gradient"], fields["exp_avg"]
        dtype = torch.float32 if moment.dtype == torch.uint8 else moment.dtype
        master, wide_gradient = weights, gradient
        if weights.dtype != dtype:
            master = scratch[0, : weights.numel()]
            join(weights, fields["remainder"], master) if "remainder" in fields else master.copy_(weights)
        if gradient.dtype != dtype:
            wide_gradient = scratch[1, : gradient.numel()].copy_(gradient)
        if self._scale is not None:
            wide_gradient.mul_(self._scale)
        self._apply(tile, master, wide_gradient)
        if master is not weights:
            if "remainder" in fields:
                split(master, weights, fields["remainder"])
            elif self._masters == "stochastic":
                round_stochastically(master, weights, self._generator(tile))
            else:
                weights.copy_(master)

    def _apply(self, tile: "_Tile", master: torch.Tensor, gradient: torch.Tensor) -> None:
        group = self._groups[id(tile.job.parameter)]
        (beta1, beta2), moments = group["betas"], (tile.fields["exp_avg"], tile.fields["exp_avg_sq"])
        constants = {"lr": group["lr"], "beta1": beta1, "beta2": beta2, "eps": group["eps"]}
        constants["weight_decay"] = group["weight_decay"]
        if moments[0].dtype == torch.uint8:
            scales = (tile.fields["exp_avg" + _ABSMAX], tile.fields["exp_avg_sq" + _ABSMAX])
            blockwise.adamw_8bit_(master, gradient, *moments, *scales, step=tile.job.step, **constants)
            return
        torch._fused_adamw_(
            [master],
            [gradient],
            [moments[0]],
            [moments[1]],
            [],
            [tile.step],
            amsgrad=False,
            maximize=False,
            **constants,
        )

    def _generator(self, tile: "_Tile") -> torch.Generator | None:
        """Make the random stream of one tile: the same in every placement, and after every resume."""
        if self._is_rehearsal:
            return None
        job = tile.job
        key = (self._seed, self.num_steps, self._numbers[id(job.parameter)], job.start + tile.start)
        seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")
        return torch.Generator(self.storage.device).manual_seed(seed)

    # ------------------------------------------------------------------------------------------ states

    def states_of(self, parameter: nn.Parameter) -> dict[str, Array]:
        """Give a parameter's states, flat arrays under their names; zeros before the first step.

        Args:
            parameter: one of those trained.

        Raises:
            DiskError: there is no room for them.
        """
        states: dict[str, Array] = self.state[parameter]
        if not states:
            # What loading has kept of fp32 weights, if anything, is where it is to be.
            tier = self.placement.optimizer
            made: dict[str, Array] = {}
            if hasattr(parameter, "rounded_off"):
                made["remainder"] = parameter.rounded_off
                del parameter.rounded_off
            for name, (numel, dtype) in state_layout(parameter, self._moments(parameter), self._masters).items():
                states[name] = made[name] if name in made else self.storage.zeros(tier, numel, dtype)
        return states

    def close(self) -> None:
        """Free the states and the gradients, and leave the parameters alone from now on."""
        self.gradients.close()
        self.state.clear()

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Let steps within the body need all their memory and change nothing: gradients count as zero.

        Only a few tiles of a few chunks of a few parameters are worked on; those on the host and on disk are not
        written back. To be entered before the first step, with a learning rate of 0.
        """
        self._is_rehearsal = True
        for parameter in self.parameters:
            self.states_of(parameter)
        try:
            yield
        finally:
            self._is_rehearsal = False
            self._scale = None
            self.zero_grad()
            for states in self.state.values():
                for array in states.values():  # 8-bit blocks have several codes for zero
                    if isinstance(array, torch.Tensor) and array.dtype == torch.uint8:
                        array.zero_()


def state_layout(parameter: nn.Parameter, moments: torch.dtype, masters: str) -> dict[str, tuple[int, torch.dtype]]:
    """Give the number of elements and the dtype of each of a parameter's states.

    Args:
        parameter: its size and dtype count.
        moments: their dtype; uint8 for blocks of 8-bit numbers.
        masters: `split` keeps what bf16 weights round away.
    """
    count = parameter.numel()
    layout = {"exp_avg": (count, moments), "exp_avg_sq": (count, moments)}
    if moments == torch.uint8:
        scales = (-(-count // blockwise.BLOCK), torch.float32)
        layout |= {"exp_avg" + _ABSMAX: scales, "exp_avg_sq" + _ABSMAX: scales}
    if masters == "split" and parameter.dtype == torch.bfloat16:
        layout["remainder"] = (count, torch.int16)
    return layout


@dataclass(frozen=True)
class _Job:
    """One chunk's update."""

    parameter: nn.Parameter
    start: int
    count: int
    step: int
    fields: Mapping[str, Field]


@dataclass(frozen=True)
class _Tile:
    """A stretch of a chunk, on the device; its step is the job's as torch's kernel wants it."""

    job: _Job
    start: int
    fields: dict[str, torch.Tensor]
    step: torch.Tensor


def _block(name: str) -> int:
    """How many elements of a parameter one element of a field stands for."""
    return blockwise.BLOCK if name.endswith(_ABSMAX) else 1


def _cut(fields: dict[str, torch.Tensor], start: int, end: int) -> dict[str, torch.Tensor]:
    """Take a tile out of a chunk; tiles start at multiples of blocks."""
    return {name: view[start // _block(name) : -(-end // _block(name))] for name, view in fields.items()}
