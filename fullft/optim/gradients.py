"""Gradients: where they add up over the micro-batches of a step, in which dtype, and their global norm.

Where the weight's own dtype on the device will do, the sum is `parameter.grad`, as autograd keeps it. Elsewhere each
parameter's gradient leaves as soon as backward has finished it, and is added up where it lands. Accumulation and
clipping stay exact in every placement.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fullft.cpu import reuse
from fullft.cpu.sums import TILE, add_, sum_in_order, sum_of_squares
from fullft.ranks import add_in_rank_order
from fullft.storage.disk import DiskArray, paged
from fullft.storage.stream import ChunkStream, Field
from fullft.storage.tiers import CHUNK, Array, Storage, is_on_host, local_of, sharded_like
from fullft.storage.workers import Workers, mark_computed
from fullft.tracing import device_type, standing_for_all

_SLOTS = 4  # chunks on their way off the device


class Gradients:
    """The sums of a step's gradients, one per parameter.

    Args:
        parameters: all that are trained.
        dtype: of the sums; None for each parameter's own.
        tier: `device`, `host`, `disk` or `released`.
        storage: makes the sums' arrays.
        use: with `released`, what is done with a gradient before it is freed.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        dtype: torch.dtype | None,
        tier: str,
        storage: Storage,
        use: Callable[[nn.Parameter], None],
    ) -> None:
        self.parameters, self.use = list(parameters), use
        self._tier, self._storage = tier, storage
        self._dtypes = {id(parameter): dtype or parameter.dtype for parameter in parameters}
        self._sums: dict[int, Array] = {}
        self._begun: set[int] = set()  # parameters whose sums hold gradients of this step
        self._sender = _Sender(storage, self._largest_chunk())
        self._released: dict[int, list[torch.Tensor]] = {}  # sums of squares of gradients that are gone
        self._hooks = []
        for parameter in parameters:
            if tier == "released":
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._release))
            elif self._gathers(parameter):
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._gather))

    def _gathers(self, parameter: nn.Parameter) -> bool:
        """Return whether autograd's own sum, `parameter.grad`, will not do."""
        return self._tier != "device" or self._dtypes[id(parameter)] != _arriving_in(parameter)

    def _largest_chunk(self) -> int:
        """Return the bytes of the largest chunk, in the widest dtype of all gradients and sums."""
        count = min(CHUNK, max(local_of(parameter).numel() for parameter in self.parameters))
        dtypes = {_arriving_in(parameter) for parameter in self.parameters} | set(self._dtypes.values())
        return paged(count * max(dtype.itemsize for dtype in dtypes))

    def of(self, parameter: nn.Parameter) -> Array | None:
        """Return the sum of a parameter's gradients, of this rank's rows; None if backward has brought none.

        Args:
            parameter: one of those trained.
        """
        if parameter.grad is not None:
            return local_of(parameter.grad)
        return self._sums[id(parameter)] if id(parameter) in self._begun else None

    def clear(self) -> None:
        """Drop the step's gradients: sums on the device are freed, others are overwritten by the next ones."""
        self._sender.finish()
        for parameter in self.parameters:
            parameter.grad = None
        self._begun.clear()
        self._released.clear()
        if self._tier == "device":
            self._sums.clear()

    def close(self) -> None:
        """Free all sums, and leave the parameters alone from now on."""
        self.clear()
        self._sums.clear()
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _gather(self, parameter: nn.Parameter) -> None:
        """Add a gradient that backward has just finished to its sum, and free it."""
        assert parameter.grad is not None
        gradient, key = local_of(parameter.grad), id(parameter)
        is_first = key not in self._begun
        if key not in self._sums:
            self._sums[key] = self._new_sum(gradient.numel(), self._dtypes[key])
        self._begun.add(key)
        sums, flat = self._sums[key], gradient.detach().reshape(-1)
        if isinstance(sums, torch.Tensor) and not (is_on_host(sums) and device_type(flat.device) != "cpu"):
            sums.copy_(flat) if is_first else add_(sums, flat)
        else:
            self._sender.send(flat, sums, is_first)
        parameter.grad = None

    def _new_sum(self, numel: int, dtype: torch.dtype) -> Array:
        # The first gradient is copied in. Such sums exist with accumulation alone, whose next forward finds them there
        # anyway: what is reused is no memory beyond the plan's.
        if self._tier == "device":
            return reuse.empty((numel,), dtype, self._storage.device)
        return self._storage.zeros(self._tier, numel, dtype)

    @torch.no_grad()
    def pretend(self) -> None:
        """Make a gradient of unknown values arrive for every parameter, as from a micro-batch; for plans."""
        for parameter in reversed(self.parameters):
            # No variable, which would keep it for longer. No operator on a sharded tensor, which traces whole ones.
            parameter.grad = sharded_like(
                parameter, torch.empty_like(local_of(parameter), dtype=_arriving_in(parameter))
            )
            if self._gathers(parameter):
                self._gather(parameter)
        self._sender.pretend_arrival()  # long before the next forward is at its peak

    @torch.no_grad()
    def _release(self, parameter: nn.Parameter) -> None:
        """Use a gradient up, and free it."""
        assert parameter.grad is not None
        flat = local_of(parameter.grad).detach().view(-1)
        self._released[id(parameter)] = [sum_of_squares(chunk) for chunk in flat.split(CHUNK)]
        self.use(parameter)
        parameter.grad = None

    @torch.no_grad()
    def norm(self, sample: Sequence[nn.Parameter] | None = None) -> torch.Tensor:
        """Return the 2-norm over all gradients, summed per parameter in a fixed order in fp64.

        Args:
            sample: read one tile of each of these alone, which takes as much memory but for some KiB; None reads all.

        Returns:
            A float64 scalar on the device (float32 on Apple's GPUs, which have no float64).

        Raises:
            ValueError: there are no gradients.
        """
        self._sender.finish()
        jobs = [
            (id(parameter), Field(array, start, min(CHUNK, array.numel() - start), is_written=False))
            for parameter in (self.parameters if sample is None else sample)
            if (array := self.of(parameter)) is not None
            for start in range(0, array.numel(), CHUNK)[: None if sample is None else 1]
        ]
        squares = {id(parameter): self._released.get(id(parameter), []) for parameter in self.parameters}
        chunks = ChunkStream(self._storage).run({"gradient": field} for _, field in jobs)
        for (key, _), chunk in zip(jobs, chunks, strict=True):
            squares[key].append(sum_of_squares(chunk["gradient"][: None if sample is None else TILE]))
        sums = [sum_in_order(each) for each in squares.values() if each]
        # A rank may have gradients of no rows at all.
        if not sums and all(self.of(parameter) is None for parameter in self.parameters):
            raise ValueError("no parameter has a gradient")
        total = sum_in_order(sums) if sums else torch.zeros((), dtype=torch.float64, device=self._storage.device)
        if isinstance(rows := self.parameters[0], DTensor):  # the ranks of a group have the others
            mesh = rows.device_mesh
            total = add_in_rank_order(total, mesh.get_group(mesh.ndim - 1))
        return total.sqrt()


def _arriving_in(parameter: nn.Parameter) -> torch.dtype:
    """Return the dtype of the gradients that backward brings: of sharded weights, that of sums over ranks."""
    return parameter.grad_dtype or parameter.dtype


# ---------------------------------------------------------------------------------------------- off the device


@dataclass
class _Slot:
    """Host memory for one chunk on its way: as it arrives, and the sum on disk that it is added to.

    On an accelerator `source` keeps the chunk, and with it the whole gradient, until it has been copied: at the latest
    until the slot is used again, which is what a plan counts.
    """

    arriving: torch.Tensor
    sums: torch.Tensor
    source: torch.Tensor | None = None
    target: tuple[int, int] = (0, 0)
    done: "Future[None]" = field(default_factory=Future)


class _Sender:
    """Adds gradients to sums off the device, chunk by chunk, in threads next to the backward pass.

    Args:
        storage: of the sums.
        num_bytes: of the largest chunk, in the widest dtype.
    """

    def __init__(self, storage: Storage, num_bytes: int) -> None:
        self._storage, self._workers = storage, storage.workers()
        self._num_bytes = num_bytes
        self._slots: deque[_Slot] = deque()

    def send(self, gradient: torch.Tensor, sums: Array, is_first: bool) -> None:
        """Send a gradient off; it may be freed on return, as far as the device allows.

        Args:
            gradient: [n], on the device.
            sums: [n], on the host or on disk.
            is_first: whether it replaces what is there.
        """
        starts = range(0, gradient.numel(), CHUNK)
        for start in standing_for_all(starts, _SLOTS):  # a plan only needs all slots filled
            chunk = gradient[start : start + CHUNK]
            slot = self._next_slot(is_on_disk=isinstance(sums, DiskArray))
            arrived = slot.arriving[: chunk.nbytes].view(chunk.dtype)
            computed = mark_computed(chunk.device)
            if device_type(chunk.device) == "cpu":
                arrived.copy_(chunk)  # and the gradient is free
            else:
                slot.source = chunk
            slot.target = (id(sums), start)
            for other in self._slots:
                if other.target == slot.target:  # of the micro-batch before: the order of additions must stay
                    other.done.result()
            slot.done = self._workers.submit(_add_to_sum, self._workers, slot, arrived, computed, sums, start, is_first)
            self._slots.append(slot)

    def pretend_arrival(self) -> None:
        """Free what is kept of gradients on their way, as their arrival does; for plans, in which nothing moves."""
        for slot in self._slots:
            slot.source = None

    def finish(self) -> None:
        """Wait until all chunks have arrived, and free the memory of those on their way."""
        while self._slots:
            self._slots.popleft().done.result()

    def _next_slot(self, *, is_on_disk: bool) -> _Slot:
        if len(self._slots) < _SLOTS:
            sums = self._num_bytes if is_on_disk else 0  # those on the host are added to where they are
            return _Slot(self._storage.buffer(self._num_bytes), self._storage.buffer(sums))
        slot = self._slots.popleft()
        slot.done.result()
        return slot


def _add_to_sum(
    workers: Workers,
    slot: _Slot,
    arrived: torch.Tensor,
    computed: torch.Event | None,
    sums: Array,
    start: int,
    is_first: bool,
) -> None:
    """Bring a chunk to the host, unless it has arrived, and add it to its sum there."""
    count = arrived.numel()
    if slot.source is not None:
        with workers.copying("out", computed):
            arrived.copy_(slot.source, non_blocking=True)
        slot.source = None
    if isinstance(sums, DiskArray):
        total = slot.sums[: count * sums.element_size()].view(sums.dtype)
        if not is_first:
            sums.read(start, count, slot.sums)
    else:
        total = sums[start : start + count]
    total.copy_(arrived) if is_first else add_(total, arrived)
    if isinstance(sums, DiskArray):
        sums.write(start, count, slot.sums)
