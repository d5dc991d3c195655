"""Where optimizer states, gradients and weights live: on the device, in the host's memory, or on disk.

Owns arrays outside the device, and the stream of chunks that brings them to it and back while it computes. What is done
with a chunk is `adamw.py`'s business, how gradients gather `gradients.py`'s, how layers come and go
`layer_streaming.py`'s.
"""

import errno
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch._guards import detect_fake_mode as active_fake_mode
from torch.utils.weak import WeakIdKeyDictionary

from fullft.errors import DiskError, OptionsError

# Elements fetched, updated and stored at a time. A multiple of 64, at which torch's fused AdamW may be cut without
# another rounding, of the blocks of 8-bit states, and of what one page of any field holds.
CHUNK = 1 << 22
# One chunk is computed on, one on its way here, one on its way back.
_SLOTS = 3
_SLAB = 1 << 30  # bytes of locked host memory taken at a time
_PAGE = 4096  # direct I/O wants addresses, offsets and lengths that are multiples of it

# ---------------------------------------------------------------------------------------------- arrays

# Storages in host memory that are no part of the device's, also where the device is a CPU: they are counted apart.
_HOST_STORAGES: WeakIdKeyDictionary = WeakIdKeyDictionary()


def is_on_host(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor was placed on the host by `Storage`, rather than on a device that happens to be a CPU."""
    return tensor.untyped_storage() in _HOST_STORAGES


class DiskArray:
    """A flat array in a file: not a tensor, but read and written in chunks of one."""

    def __init__(self, file: "DiskFile", offset: int, numel: int, dtype: torch.dtype) -> None:
        """Describe a part of a file.

        Args:
            file: that holds it.
            offset: where it starts, in bytes; a multiple of a page.
            numel: elements.
            dtype: of each.
        """
        self.file, self.offset, self.dtype = file, offset, dtype
        self.shape = torch.Size([numel])

    def numel(self) -> int:
        """Count the elements."""
        return self.shape[0]

    def element_size(self) -> int:
        """Give the bytes of an element."""
        return self.dtype.itemsize

    def read(self, start: int, count: int, target: torch.Tensor) -> None:
        """Read elements.

        Args:
            start: the first one; at a page boundary.
            count: of them.
            target: [whole pages] uint8, page-aligned, on the CPU.

        Raises:
            DiskError: the file is shorter than it was.
            OSError: it cannot be read.
        """
        self.file.transfer(os.preadv, self._offset(start), target[: paged(count * self.dtype.itemsize)])

    def write(self, start: int, count: int, source: torch.Tensor) -> None:
        """Write elements; what follows them in their last page is padding.

        Args:
            start: the first one; at a page boundary.
            count: of them.
            source: [whole pages] uint8, page-aligned, on the CPU.

        Raises:
            OSError: the disk is full or cannot be written.
        """
        self.file.transfer(os.pwritev, self._offset(start), source[: paged(count * self.dtype.itemsize)])

    def _offset(self, start: int) -> int:
        return self.offset + start * self.dtype.itemsize


class DiskFile:
    """A file without a name, so that not even a killed run leaves it behind; its space is taken as arrays are made."""

    def __init__(self, folder: Path) -> None:
        """Make an empty one.

        Args:
            folder: on the disk to use; the nearest one that exists takes its place. On fake tensors the file is only
                planned: it counts bytes, and reads and writes nothing.
        """
        self.num_bytes = 0
        self._file = None
        if active_fake_mode() is None:
            existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
            self._file = tempfile.TemporaryFile(dir=existing, prefix=".fullft-offload-")
            set_direct(self._file, True)

    def allocate(self, numel: int, dtype: torch.dtype) -> DiskArray:
        """Take the space of an array of zeros.

        Args:
            numel: elements.
            dtype: of each.

        Raises:
            DiskError: the disk has less room.
        """
        array = DiskArray(self, self.num_bytes, numel, dtype)
        size = paged(numel * dtype.itemsize)
        if self._file is not None and size:
            try:
                self._take(size)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
                raise DiskError(
                    f"offload: there is no room for {(self.num_bytes + size) / 1e9:.1f} GB beside the output folder "
                    f"({error.strerror}): free some space, choose an --output_dir on another disk, or offload less"
                ) from error
        self.num_bytes += size
        return array

    def _take(self, size: int) -> None:
        """Make the file longer, by space that is there."""
        assert self._file is not None
        descriptor = self._file.fileno()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, self.num_bytes, size)
            return
        os.ftruncate(descriptor, self.num_bytes + size)  # macOS takes space as it is written
        if size > os.fstatvfs(descriptor).f_bavail * os.fstatvfs(descriptor).f_frsize:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def transfer(self, operation: Callable[..., int], offset: int, memory: torch.Tensor) -> None:
        """Read or write all bytes of a piece of memory.

        Args:
            operation: `os.preadv` or `os.pwritev`.
            offset: in the file.
            memory: [bytes] uint8 on the CPU.
        """
        if self._file is None:
            return
        view, done = memory.numpy().data, 0
        while done < len(view):
            count = operation(self._file.fileno(), [view[done:]], offset + done)
            if count == 0:
                raise DiskError(
                    "offload: the file of what is kept on disk is shorter than it was written: its disk is failing or "
                    "somebody has truncated it; --resume_from_checkpoint continues from the last checkpoint"
                )
            done += count


def set_direct(file: IO[bytes], is_direct: bool) -> None:
    """Have a file read and written past the page cache, which slows writing down to a fifth, or through it.

    Args:
        file: unbuffered, or used by its descriptor alone. Some file systems have no way past.
        is_direct: then addresses, offsets and lengths are to be whole pages.
    """
    with suppress(ImportError, OSError):
        import fcntl  # not on Windows

        flags, direct = fcntl.fcntl(file, fcntl.F_GETFL), getattr(os, "O_DIRECT", 0)
        fcntl.fcntl(file, fcntl.F_SETFL, flags | direct if is_direct else flags & ~direct)


Array = torch.Tensor | DiskArray


def home_of(parameter: torch.Tensor) -> Array:
    """Give the array that holds a weight between uses: the parameter itself, unless its layer is streamed.

    Args:
        parameter: of a model.
    """
    home: Array = getattr(parameter, "home", parameter)
    return home


def paged(num_bytes: int) -> int:
    """Round up to whole pages."""
    return -(-num_bytes // _PAGE) * _PAGE


class Storage:
    """Makes arrays of zeros where they are to live."""

    def __init__(self, device: torch.device, folder: Path | str) -> None:
        """Make nothing yet.

        Args:
            device: that computes.
            folder: on the disk for what lives on disk.
        """
        self.device = device
        self._folder = Path(folder)
        self._file: DiskFile | None = None
        self._slab: torch.Tensor | None = None

    @property
    def disk_bytes(self) -> int:
        """What the arrays on disk take."""
        return 0 if self._file is None else self._file.num_bytes

    def zeros(self, tier: str, numel: int, dtype: torch.dtype) -> Array:
        """Make a flat array of zeros.

        Args:
            tier: `device`, `paged` (there, but moved to the host and back as CUDA sees fit), `host` or `disk`.
            numel: elements.
            dtype: of each.

        Raises:
            DiskError: the disk has less room.
        """
        if tier == "paged" and self.device.type == "cuda":
            return _paged_memory(numel, dtype, self.device)
        if tier == "disk":
            self._file = self._file or DiskFile(self._folder)
            return self._file.allocate(numel, dtype)
        if tier in ("device", "paged"):
            return torch.zeros(numel, dtype=dtype, device=self.device)
        num_bytes = numel * dtype.itemsize
        tensor = self._host_memory(num_bytes)[:num_bytes].view(dtype)
        _HOST_STORAGES[tensor.untyped_storage()] = True
        return tensor

    def _host_memory(self, num_bytes: int) -> torch.Tensor:
        """Give zeroed bytes; for accelerators parts of large locked slabs: each is rounded up to a power of two."""
        if self.device.type == "cpu":
            return torch.zeros(num_bytes, dtype=torch.uint8)
        size = paged(num_bytes)
        if self._slab is None or self._slab.numel() < size:
            self._slab = torch.zeros(max(_SLAB, size), dtype=torch.uint8, pin_memory=True)
        memory, self._slab = self._slab[:size], self._slab[size:]
        return memory


def _paged_memory(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    try:
        from bitsandbytes.functional import get_paged
    except ImportError as error:
        raise OptionsError("--optim paged_adamw_8bit needs bitsandbytes: pip install bitsandbytes") from error
    memory: torch.Tensor = get_paged(numel, dtype=dtype, device=device)
    return memory.zero_()


def host_pieces(array: Array) -> Iterator[torch.Tensor]:
    """Give an array's content piece by piece, on the CPU: a tensor as a whole, what is on disk in chunks.

    Args:
        array: of any shape.
    """
    if isinstance(array, torch.Tensor):
        yield array.detach().cpu()
        return
    buffer = aligned_bytes(paged(min(CHUNK, array.numel()) * array.element_size()), torch.device("cpu"))
    for start in range(0, array.numel(), CHUNK):
        count = min(CHUNK, array.numel() - start)
        array.read(start, count, buffer)
        yield buffer[: count * array.element_size()].view(array.dtype)


def fill(array: Array, values: torch.Tensor, first: int = 0) -> None:
    """Set an array's content, or a stretch of it.

    Args:
        array: of any shape.
        values: on the CPU, of the same dtype.
        first: the element to begin with; on disk at a page boundary, and a stretch ends at one or with the array.
    """
    values = values.reshape(-1)
    if isinstance(array, torch.Tensor):
        array.detach().view(-1)[first : first + values.numel()].copy_(values)
        return
    if values.numel() == 0:
        return
    buffer = aligned_bytes(paged(min(CHUNK, values.numel()) * array.element_size()), torch.device("cpu"))
    for start, piece in zip(range(0, values.numel(), CHUNK), values.split(CHUNK), strict=True):
        buffer[: piece.numel() * array.element_size()].view(array.dtype).copy_(piece)
        array.write(first + start, piece.numel(), buffer)


def aligned_bytes(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Make uninitialised bytes in host memory that start at a page, as direct I/O wants.

    Args:
        num_bytes: of them.
        device: that data moves to and from.
    """
    if device.type != "cpu":  # locked memory starts at a page by itself
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    memory = torch.empty(num_bytes + _PAGE, dtype=torch.uint8)
    start = 0 if active_fake_mode() else -memory.data_ptr() % _PAGE
    return memory[start : start + num_bytes]


# ---------------------------------------------------------------------------------------------- the stream of chunks


@dataclass(frozen=True, eq=False)
class Field:
    """A stretch of an array that a job needs.

    Attributes:
        array: flat, or a tensor that can be viewed so.
        start: the first element.
        count: of elements.
        is_written: whether it goes back when the job is done.
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
        """Its size in a slot: whole pages."""
        return paged(self.count * self.array.element_size())


@dataclass
class _Slot:
    """Memory on the device for one job's fields, with its twin on the host; on a CPU they are the same."""

    device: torch.Tensor
    host: torch.Tensor
    free: torch.Event | None  # when the computation has left the memory that this was made of
    stored: "Future[None] | None" = None


@dataclass
class _Visit:
    """One job on its way: the fields that are not on the device, where they lie in a slot, and all views."""

    slot: _Slot | None
    views: dict[str, torch.Tensor]
    staged: list[tuple[Field, int, torch.Tensor]] = field(default_factory=list)
    fetched: "Future[None] | None" = None


def mark_computed(device: torch.device) -> torch.Event | None:
    """Mark where the computation on an accelerator is; a CPU's is never behind.

    Args:
        device: that computes.
    """
    return None if device.type == "cpu" else torch.accelerator.current_stream(device).record_event()


class Workers:
    """Threads that move data beside the computation.

    Disks and accelerators work by themselves, and Python waits for them elsewhere. On fake tensors nothing moves.
    """

    def __init__(self, device: torch.device) -> None:
        """Start none yet.

        Args:
            device: that computes.
        """
        self.device = device
        self._threads: ThreadPoolExecutor | None = None
        # One each way: an accelerator copies in both directions at once.
        self._copies = None if device.type == "cpu" else {way: torch.Stream(device) for way in ("in", "out")}

    def submit(self, work: Callable[..., None], *arguments: Any) -> "Future[None]":
        """Have something done.

        Args:
            work: calls no operator that allocates.
            arguments: of it.
        """
        if active_fake_mode() is not None:
            future: Future[None] = Future()
            future.set_result(None)
            return future
        if self._threads is None:
            # A second team of threads for operators would slow both down several times: each worker gets one.
            self._threads = ThreadPoolExecutor(_SLOTS, "offload", initializer=torch.set_num_threads, initargs=(1,))
        # The thread's own record of its work outlives the result for a moment; what the work held must not.
        box = [arguments]
        return self._threads.submit(lambda: work(*box.pop()))

    @contextmanager
    def copying(self, way: str, after: torch.Event | None = None) -> Iterator[None]:
        """Queue what the body copies on a stream of its own, and wait for it at the end; nothing special on a CPU.

        Args:
            way: `in`, to the device, or `out`.
            after: of the computation, that it waits for.
        """
        if self._copies is None:
            yield
            return
        stream = self._copies[way]
        if after is not None:
            stream.wait_event(after)
        with stream:
            yield
        stream.synchronize()


class ChunkStream:
    """Brings fields to the device ahead of the computation, and takes them back behind it."""

    def __init__(self, device: torch.device) -> None:
        """Start nothing yet.

        Args:
            device: that computes.
        """
        self._device = device
        self._workers = Workers(device)

    def run(self, jobs: Iterable[Mapping[str, Field]]) -> Iterator[dict[str, torch.Tensor]]:
        """Give each job's fields as tensors on the device, in order; to be changed in place before the next is asked.

        Args:
            jobs: any number; those whose fields are all on the device cost nothing.

        Yields:
            [count] views, under the fields' names.
        """
        jobs = list(jobs)
        size = max((sum(each.num_bytes for each in job.values() if each.is_away) for job in jobs), default=0)
        free = deque(self._make_slot(size) for _ in range(_SLOTS if size else 0))
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

    def _make_slot(self, size: int) -> _Slot:
        host = aligned_bytes(size, self._device)
        on_device = host if self._device.type == "cpu" else torch.empty_like(host, device=self._device)
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
