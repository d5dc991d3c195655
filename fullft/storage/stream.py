"""The stream of chunks: fields of arrays are brought to the device ahead of the computation, and stored behind it."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

import torch

from fullft.storage.disk import DiskArray, paged
from fullft.storage.tiers import Array, Storage, is_on_host
from fullft.storage.workers import mark_computed
from fullft.tracing import device_type

# One chunk is computed on, one comes, one goes.
_SLOTS = 3


@dataclass(frozen=True, eq=False)
class Field:
    """A stretch of an array that a job needs.

    Attributes:
        array: flat, or a tensor that can be viewed so.
        start: the first element.
        count: how many elements.
        is_written: whether it is stored when the job is done.
    """

    array: Array
    start: int
    count: int
    is_written: bool

    @property
    def is_away(self) -> bool:
        """Whether it must be brought to the device."""
        return isinstance(self.array, DiskArray) or is_on_host(self.array)

    @property
    def num_bytes(self) -> int:
        """Its size in a slot, in whole pages."""
        return paged(self.count * self.array.element_size())


@dataclass
class _Slot:
    """Memory on the device for one job's fields, and on the host for those from disk; on a CPU they are the same."""

    device: torch.Tensor
    host: torch.Tensor
    free: torch.Event | None  # the computation before it may still use this memory
    stored: "Future[None] | None" = None


@dataclass
class _Visit:
    """One job on its way: the fields that are not on the device, where they lie in a slot, and all views."""

    slot: _Slot | None
    views: dict[str, torch.Tensor]
    staged: list[tuple[Field, int, torch.Tensor]] = field(default_factory=list)
    fetched: "Future[None] | None" = None


class ChunkStream:
    """Brings fields to the device ahead of the computation, and stores them behind it.

    Args:
        storage: of the fields' arrays.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage, self._device = storage, storage.device
        self._workers = storage.workers()

    def run(self, jobs: Iterable[Mapping[str, Field]]) -> Iterator[dict[str, torch.Tensor]]:
        """Yield each job's fields as tensors on the device, in order; change them in place before asking for the next.

        Args:
            jobs: any number. Those whose fields are all on the device cost nothing.

        Yields:
            [count] views, under the fields' names.
        """
        jobs = list(jobs)
        size = max((sum(each.num_bytes for each in job.values() if each.is_away) for job in jobs), default=0)
        uses_disk = any(isinstance(each.array, DiskArray) for job in jobs for each in job.values())
        free = deque(self._make_slot(size, uses_disk=uses_disk) for _ in range(_SLOTS if size else 0))
        remaining = iter(jobs)
        ahead: deque[_Visit] = deque()

        def fetch_next() -> None:
            if (job := next(remaining, None)) is not None:
                ahead.append(self._fetch(job, free))

        try:
            for _ in range(_SLOTS - 1):
                fetch_next()
            while ahead:
                visit = ahead.popleft()
                if visit.fetched is not None:
                    visit.fetched.result()
                yield visit.views
                if visit.slot is not None:
                    self._store(visit)
                    free.append(visit.slot)
                fetch_next()
        finally:
            # Nothing may still write into memory that is given back.
            waiting = [visit.fetched for visit in ahead] + [slot.stored for slot in free]
            under_way = [future for future in waiting if future is not None]
            wait(under_way)
            for future in under_way:
                future.result()

    def _make_slot(self, size: int, *, uses_disk: bool) -> _Slot:
        is_shared = device_type(self._device) == "cpu"
        host = self._storage.buffer(size if is_shared or uses_disk else 0)
        on_device = host if is_shared else torch.empty(size, dtype=torch.uint8, device=self._device)
        return _Slot(on_device, host, mark_computed(self._device))

    def _fetch(self, job: Mapping[str, Field], free: "deque[_Slot]") -> _Visit:
        is_any_away = any(each.is_away for each in job.values())
        visit = _Visit(free.popleft() if is_any_away else None, {})
        place = 0
        for name, each in job.items():
            if visit.slot is None or not each.is_away:
                visit.views[name] = _stretch(each)
                continue
            visit.views[name] = _typed(visit.slot.device, each, place)
            visit.staged.append((each, place, visit.views[name]))
            place += each.num_bytes
        if visit.slot is not None:
            visit.fetched = self._workers.submit(self._bring, visit)
        return visit

    def _store(self, visit: _Visit) -> None:
        visit.slot.stored = self._workers.submit(self._take_back, visit, mark_computed(self._device))  # type: ignore[union-attr]

    # ------------------------------------------------------------------------------------------ in the threads

    def _bring(self, visit: _Visit) -> None:
        slot = visit.slot
        assert slot is not None
        if slot.stored is not None:
            slot.stored.result()  # submitted before this, so it is under way or done
        with self._workers.copying("in", slot.free):
            for each, place, device in visit.staged:
                if isinstance(each.array, DiskArray):
                    each.array.read(each.start, each.count, slot.host[place : place + each.num_bytes])
                    if slot.host is not slot.device:
                        device.copy_(_typed(slot.host, each, place), non_blocking=True)
                else:
                    device.copy_(_stretch(each), non_blocking=True)

    def _take_back(self, visit: _Visit, computed: torch.Event | None) -> None:
        slot = visit.slot
        assert slot is not None
        written = [staged for staged in visit.staged if staged[0].is_written]
        with self._workers.copying("out", computed):
            for each, place, device in written:
                if not isinstance(each.array, DiskArray):
                    _stretch(each).copy_(device, non_blocking=True)
                elif slot.host is not slot.device:
                    _typed(slot.host, each, place).copy_(device, non_blocking=True)
        for each, place, _ in written:
            if isinstance(each.array, DiskArray):
                each.array.write(each.start, each.count, slot.host[place : place + each.num_bytes])


def _stretch(each: Field) -> torch.Tensor:
    array = each.array
    assert isinstance(array, torch.Tensor)
    return array.detach().view(-1)[each.start : each.start + each.count]


def _typed(memory: torch.Tensor, each: Field, place: int) -> torch.Tensor:
    """View a place in a slot as the field that it holds."""
    return memory[place : place + each.count * each.array.element_size()].view(each.array.dtype)
