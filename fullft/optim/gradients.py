"""Gradients: where they gather over the micro-batches of a step, in which dtype, and their global norm.

Owns the sums and the norm. Where the weight's own dtype on the device will do, the sum is `parameter.grad`, as autograd
keeps it. Elsewhere each parameter's gradient leaves as soon as backward has finished it, and is added up where it
lands, so that accumulation and clipping stay exact in every placement.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import nn
from torch._guards import detect_fake_mode as active_fake_mode

from fullft.cpu import recycling
from fullft.storage.tiers import (
    CHUNK,
    Array,
    ChunkStream,
    DiskArray,
    Field,
    Storage,
    Workers,
    aligned_bytes,
    mark_computed,
    paged,
)

# Elements that a CPU squares, or widens to add them, at a time: few enough for its cache. One thread sums a row of the
# squares; a row that is alone must be shorter than 2^15, from where on torch has threads share it. Rows belong to the
# numerics: those of another length sum in another order.
NORM_TILE = 1 << 17
NORM_ROW = 1 << 14
_DEPARTING = 4  # chunks on their way off the device


class Gradients:
    """The sums of a step's gradients, one per parameter."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        dtype: torch.dtype | None,
        tier: str,
        storage: Storage,
        use: Callable[[nn.Parameter], None],
    ) -> None:
        """Arrange for the gradients of every backward from now on.

        Args:
            parameters: all that are trained.
            dtype: of the sums; None for each parameter's own.
            tier: `device`, `host`, `disk` or `released`.
            storage: makes the sums' arrays.
            use: with `released`, what is done with a gradient before it is freed.
        """
        self.parameters, self._tier, self._storage = list(parameters), tier, storage
        self._dtypes = {id(parameter): dtype or parameter.dtype for parameter in parameters}
        self._sums: dict[int, Array] = {}
        self._begun: set[int] = set()  # whose sums hold gradients of this step
        self._departures = _Departures(storage.device, self._largest_chunk())
        self._use = use
        self._released: dict[int, list[torch.Tensor]] = {}  # sums of squares of gradients that are gone
        self._hooks = []
        for parameter in parameters:
            if tier == "released":
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._release))
            elif self._gathers(parameter):
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._gather))

    def _gathers(self, parameter: nn.Parameter) -> bool:
        """Tell whether autograd's own sum, `parameter.grad`, will not do."""
        return self._tier != "device" or self._dtypes[id(parameter)] != parameter.dtype

    def _largest_chunk(self) -> int:
        """Give the bytes of the largest chunk, in the widest dtype of all gradients and sums."""
        count = min(CHUNK, max(parameter.numel() for parameter in self.parameters))
        dtypes = {parameter.dtype for parameter in self.parameters} | set(self._dtypes.values())
        return paged(count * max(dtype.itemsize for dtype in dtypes))

    def of(self, parameter: nn.Parameter) -> Array | None:
        """Give the sum of a parameter's gradients, or None if backward has brought none.

        Args:
            parameter: one of those trained.
        """
        if parameter.grad is not None:
            return parameter.grad
        return self._sums[id(parameter)] if id(parameter) in self._begun else None

    def clear(self) -> None:
        """Forget the step's gradients: sums on the device are freed, others are written over by the next ones."""
        self._departures.finish()
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
        """Add what backward has just finished to its sum, and free it."""
        gradient, key = parameter.grad, id(parameter)
        assert gradient is not None
        is_first = key not in self._begun
        if key not in self._sums:
            self._sums[key] = self._new_sum(gradient.numel(), self._dtypes[key])
        self._begun.add(key)
        sums, flat = self._sums[key], gradient.detach().reshape(-1)
        if isinstance(sums, torch.Tensor) and sums.device == flat.device:
            sums.copy_(flat) if is_first else add_(sums, flat)
        else:
            self._departures.start(flat, sums, is_first)
        parameter.grad = None

    def _new_sum(self, numel: int, dtype: torch.dtype) -> Array:
        # The first gradient is copied in. There are such sums with accumulation alone, whose next forward finds them
        # there anyway: what is recycled is no memory beyond the plan's.
        if self._tier == "device":
            return recycling.empty((numel,), dtype, self._storage.device)
        return self._storage.zeros(self._tier, numel, dtype)

    @torch.no_grad()
    def pretend(self) -> None:
        """Let a gradient of unknown values arrive for every parameter, as from a micro-batch; for plans."""
        for parameter in reversed(self.parameters):
            parameter.grad = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            if self._gathers(parameter):
                self._gather(parameter)

    @torch.no_grad()
    def _release(self, parameter: nn.Parameter) -> None:
        """Use a gradient up, and free it."""
        assert parameter.grad is not None
        flat = parameter.grad.detach().view(-1)
        self._released[id(parameter)] = [_sum_of_squares(chunk) for chunk in flat.split(CHUNK)]
        self._use(parameter)
        parameter.grad = None

    @torch.no_grad()
    def norm(self, only: Sequence[nn.Parameter] | None = None) -> torch.Tensor:
        """Take the 2-norm over all gradients, summed per parameter in a fixed order in fp64.

        Args:
            only: look at a tile of each of these alone, which needs as much memory but for some KiB; None looks at all.

        Returns:
            A float64 scalar on the device (float32 on Apple's, which has no float64).

        Raises:
            ValueError: there are no gradients.
        """
        self._departures.finish()
        jobs = [
            (id(parameter), Field(array, start, min(CHUNK, array.numel() - start), is_written=False))
            for parameter in (self.parameters if only is None else only)
            if (array := self.of(parameter)) is not None
            for start in range(0, array.numel(), CHUNK)[: None if only is None else 1]
        ]
        squares = {id(parameter): self._released.get(id(parameter), []) for parameter in self.parameters}
        chunks = ChunkStream(self._storage.device).run({"gradient": field} for _, field in jobs)
        for (key, _), chunk in zip(jobs, chunks, strict=True):
            squares[key].append(_sum_of_squares(chunk["gradient"][: None if only is None else NORM_TILE]))
        sums = [_sum_in_order(each) for each in squares.values() if each]
        if not sums:
            raise ValueError("no parameter has a gradient")
        return _sum_in_order(sums).sqrt()


def _sum_in_order(scalars: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum any number of scalars, in an order that does not depend on how many threads there are."""
    return torch.stack([row.sum() for row in torch.stack(list(scalars)).split(NORM_ROW)]).sum()


def _sum_of_squares(gradient: torch.Tensor) -> torch.Tensor:
    """Sum a flat chunk's squares, in fp64, in an order that does not depend on how many threads there are."""
    if gradient.device.type != "cpu":
        wide = torch.float32 if gradient.device.type == "mps" else torch.float64
        norm: torch.Tensor = torch.linalg.vector_norm(gradient, dtype=wide)
        return norm.square_()
    # vector_norm would hold an fp64 copy of all of it; a tile's stays in the cache.
    count = len(gradient) // NORM_ROW
    rows, rest = gradient[: count * NORM_ROW].view(count, NORM_ROW), gradient[count * NORM_ROW :]
    buffer = torch.empty(min(count, NORM_TILE // NORM_ROW), NORM_ROW, dtype=torch.float64)
    tiles = rows.split(NORM_TILE // NORM_ROW)
    norms = [torch.linalg.vector_norm(buffer[: len(tile)].copy_(tile), dim=1) for tile in tiles]
    norms.append(torch.linalg.vector_norm(rest.double(), keepdim=True))
    return torch.cat(norms).square_().sum()


def add_(total: torch.Tensor, values: torch.Tensor) -> None:
    """Add flat values of a narrower dtype; a CPU would first make a wide copy of all of them.

    Args:
        total: [n], added to in place.
        values: [n].
    """
    if total.device.type != "cpu" or total.dtype == values.dtype or active_fake_mode() is not None:
        total.add_(values)
        return
    for tile, narrow in zip(total.split(NORM_TILE), values.split(NORM_TILE), strict=True):
        tile.add_(narrow)


# ---------------------------------------------------------------------------------------------- leaving the device


@dataclass
class _Berth:
    """Host memory for one chunk that leaves: as it comes, and the sum that it is added to."""

    arriving: torch.Tensor
    sums: torch.Tensor
    target: tuple[int, int] = (0, 0)
    done: "Future[None]" = field(default_factory=Future)


class _Departures:
    """Adds gradients to sums elsewhere, chunk by chunk, in threads beside the backward pass."""

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        self._workers = Workers(device)
        self._num_bytes = num_bytes  # of the largest chunk, in the widest dtype
        self._berths: deque[_Berth] = deque()

    def start(self, gradient: torch.Tensor, sums: Array, is_first: bool) -> None:
        """Send a gradient off; it may be freed on return, as far as the device allows.

        Args:
            gradient: [n], on the device.
            sums: [n], on the host or on disk.
            is_first: whether it takes the place of what is there.
        """
        starts = range(0, gradient.numel(), CHUNK)
        if active_fake_mode() is not None:
            starts = starts[: _DEPARTING - len(self._berths)]  # a plan needs no more than to fill the berths
        for start in starts:
            chunk = gradient[start : start + CHUNK]
            berth = self._next_berth()
            arrived = berth.arriving[: chunk.nbytes].view(chunk.dtype)
            computed, source = mark_computed(chunk.device), None
            if computed is None:
                arrived.copy_(chunk)  # and the gradient is free
            else:
                source = chunk
            berth.target = (id(sums), start)
            for other in self._berths:
                if other.target == berth.target:  # of the micro-batch before: sums must be added to in order
                    other.done.result()
            berth.done = self._workers.submit(
                _add, self._workers, berth, arrived, source, computed, sums, start, is_first
            )
            self._berths.append(berth)

    def finish(self) -> None:
        """Wait until all have arrived, and free the memory of those on their way."""
        while self._berths:
            self._berths.popleft().done.result()

    def _next_berth(self) -> _Berth:
        if len(self._berths) < _DEPARTING:
            arriving, total = (aligned_bytes(self._num_bytes, self._workers.device) for _ in range(2))
            return _Berth(arriving, total)
        berth = self._berths.popleft()
        berth.done.result()
        return berth


def _add(
    workers: Workers,
    berth: _Berth,
    arrived: torch.Tensor,
    source: torch.Tensor | None,
    computed: torch.Event | None,
    sums: Array,
    start: int,
    is_first: bool,
) -> None:
    """Bring a chunk to the host, unless it has arrived, and add it to its sum there."""
    count = arrived.numel()
    if source is not None:
        with workers.copying("out", computed):
            arrived.copy_(source, non_blocking=True)
    if isinstance(sums, DiskArray):
        total = berth.sums[: count * sums.element_size()].view(sums.dtype)
        if not is_first:
            sums.read(start, count, berth.sums)
    else:
        total = sums[start : start + count]
    total.copy_(arrived) if is_first else add_(total, arrived)
    if isinstance(sums, DiskArray):
        sums.write(start, count, berth.sums)
