"""The stream of chunks: fields of arrays are brought to the device ahead of the computation, and stored behind it.

The order of events. Chunks take turns in three slots of memory. A chunk's fields are copied into its slot after what
was there before is stored, and the computation waits for that copy. Its results are copied out after they are computed.
At the end the computation waits for the last of them, so that whatever follows it also follows the stores.

It is the device's streams that wait for each other. The host queues their copies and goes on. Only where a disk is read
or written does it wait: a thread reads before it queues the copy in, and writes once the copy out is done.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import wait
from dataclasses import dataclass, field

import torch

from fullft.storage.disk import DiskArray, paged
from fullft.storage.tiers import Array, Storage, is_on_host
from fullft.storage.workers import Moved, mark_computed, moved, wait_for, wait_for_all
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
    def is_on_disk(self) -> bool:
        """Whether it must be read from disk."""
        return isinstance(self.array, DiskArray)

    @property
    def num_bytes(self) -> int:
        """Its size in a slot, in whole pages."""
        return paged(self.count * self.array.element_size())


@dataclass
class _Slot:
    """Memory on the device for one job's fields, and on the host for those from disk; on a CPU they are the same."""

    device: torch.Tensor
    host: torch.Tensor
    stored: Moved  # what was there before: this memory may be overwritten after its event, on the host at once


@dataclass
class _Visit:
    """One job on its way: the fields that are not on the device, where they lie in a slot, and all views."""

    slot: _Slot | None
    views: dict[str, torch.Tensor]
    staged: list[tuple[Field, int, torch.Tensor]] = field(default_factory=list)
    fetched: Moved | None = None


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
        uses_disk = any(each.is_on_disk for job in jobs for each in job.values())
        free = deque(self._make_slot(size, uses_disk=uses_disk) for _ in range(_SLOTS if size else 0))
        remaining = iter(jobs)
        ahead: deque[_Visit] = deque()

        def fetch_next() -> None:
            if (job := next(remaining, None)) is not None:
                ahead.append(self._fetch(job, free, uses_disk))

        try:
            for _ in range(_SLOTS - 1):
                fetch_next()
            while ahead:
                visit = ahead[0]
                if visit.fetched is not None:
                    self._workers.compute_after(visit.fetched.result())
                yield visit.views
                ahead.popleft()
                if visit.slot is not None:
                    self._store(visit, uses_disk)
                    free.append(visit.slot)
                fetch_next()
        finally:
            # The slots' memory is given back: no thread may still use it, and no stream once the computation goes on.
            under_way = [visit.fetched for visit in ahead if visit.fetched is not None]
            under_way += [slot.stored for slot in free]
            wait(under_way)
            if ahead:  # an error has ended it early
                wait_for_all(self._device)
            for future in under_way:
                self._workers.compute_after(future.result())

    def _make_slot(self, size: int, *, uses_disk: bool) -> _Slot:
        is_shared = device_type(self._device) == "cpu"
        host = self._storage.buffer(size if is_shared or uses_disk else 0)
        on_device = host if is_shared else torch.empty(size, dtype=torch.uint8, device=self._device)
        return _Slot(on_device, host, moved(mark_computed(self._device)))

    def _fetch(self, job: Mapping[str, Field], free: "deque[_Slot]", uses_disk: bool) -> _Visit:
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
            visit.fetched = self._workers.start(self._bring, visit, visit.slot, waits=uses_disk)
        return visit

    def _store(self, visit: _Visit, uses_disk: bool) -> None:
        slot, computed = visit.slot, mark_computed(self._device)
        assert slot is not None
        slot.stored = self._workers.start(self._take_back, visit, slot, computed, waits=uses_disk)

    # --------------------------------------------------------------------- in threads, where there is a disk or a CPU

    def _bring(self, visit: _Visit, slot: _Slot) -> torch.Event | None:
        free = slot.stored.result()  # started before this, so it is under way or done
        copies = []
        for each, place, device in visit.staged:
            if not isinstance(each.array, DiskArray):
                copies.append((device, _stretch(each)))
                continue
            each.array.read(each.start, each.count, slot.host[place : place + each.num_bytes])
            if slot.host is not slot.device:
                copies.append((device, _typed(slot.host, each, place)))
        return self._workers.copy("in", copies, free)

    def _take_back(self, visit: _Visit, slot: _Slot, computed: torch.Event | None) -> torch.Event | None:
        written = [staged for staged in visit.staged if staged[0].is_written]
        copies = []
        for each, place, device in written:
            if not isinstance(each.array, DiskArray):
                copies.append((_stretch(each), device))
            elif slot.host is not slot.device:
                copies.append((_typed(slot.host, each, place), device))
        stored = self._workers.copy("out", copies, computed)
        if any(each.is_on_disk for each, *_ in visit.staged):
            wait_for(stored)  # then the copies in are done, too, and the slot's memory on the host is free
        for each, place, _ in written:
            if isinstance(each.array, DiskArray):
                each.array.write(each.start, each.count, slot.host[place : place + each.num_bytes])
        return stored


def _stretch(each: Field) -> torch.Tensor:
    array = each.array
    assert isinstance(array, torch.Tensor)
    return array.detach().view(-1)[each.start : each.start + each.count]


def _typed(memory: torch.Tensor, each: Field, place: int) -> torch.Tensor:
    """View a place in a slot as the field that it holds."""
    return memory[place : place + each.count * each.array.element_size()].view(each.array.dtype)
