"""The machine to plan for: the memory of its device, host and disk, and how fast bytes move between them.

Where several ranks run on it, each has its share of what they have in common.
"""

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from fullft.config.config import Config
from fullft.errors import DiskError
from fullft.hardware import available_host_bytes
from fullft.model.precision import dtype_of
from fullft.ranks import by_each_rank
from fullft.storage.disk import DiskFile, aligned_bytes
from fullft.storage.tiers import CHUNK

CONTEXT_BYTES = 2**29  # what a CUDA context takes of a card
CARDS = (10, 16, 24, 40, 48, 80, 141)
_UNKNOWN = sys.maxsize


@dataclass(frozen=True)
class Device:
    """Something for a rank to run on.

    Attributes:
        name: as messages call it.
        memory_bytes: what a run may take of its memory.
        host_bytes: what it may take of the host's memory besides.
        disk_bytes: what it may take of the disk.
        is_host: whether the device's memory is the host's: then both come out of `memory_bytes`.
    """

    name: str
    memory_bytes: int
    host_bytes: int = _UNKNOWN
    disk_bytes: int = _UNKNOWN
    is_host: bool = False


def find_device(config: Config, device: torch.device) -> Device:
    """Return the device at hand, or the card that `--device_memory` describes, with this rank's share of the machine.

    Args:
        config: `device_memory`, `plan`, `output_dir` and the ranks are read. The host of a card that is only planned
            for is unknown.
        device: where training would run.
    """
    if config.device_memory_bytes is not None:
        memory = max(0, config.device_memory_bytes - CONTEXT_BYTES)
        if config.plan:
            return Device(f"{config.device_memory} card", memory)
        return Device(f"{config.device_memory} card", memory, _free_host(config), _free_disk(config))
    if device.type == "cuda":
        name, free = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[0]
        return Device(name, free, _free_host(config), _free_disk(config))
    if device.type == "mps":
        memory = torch.mps.recommended_max_memory()
        return Device("this Mac's GPU", memory, available_host_bytes() - memory, _free_disk(config))
    count = config.place.local_count
    name = "this machine (CPU)" + (f", 1/{count} of it" if count > 1 else "")
    return Device(name, _free_host(config), 0, _free_disk(config), is_host=True)


def least_of(devices: Sequence[Device]) -> Device:
    """Return a device that has no more of anything than any rank's: what fits there fits everywhere.

    Args:
        devices: of the ranks.
    """
    smallest = min(devices, key=lambda device: device.memory_bytes)
    return replace(
        smallest,
        host_bytes=min(device.host_bytes for device in devices),
        disk_bytes=min(device.disk_bytes for device in devices),
    )


def cards() -> list[Device]:
    """List the usual cards: nominal GiB, less the context."""
    return [Device(f"{size} GB card", size * 2**30 - CONTEXT_BYTES) for size in CARDS]


def _free_host(config: Config) -> int:
    return available_host_bytes() // config.place.local_count


def _free_disk(config: Config) -> int:
    """Return this rank's share of the file system that has `output_dir`, which all ranks write to."""
    folder = config.output_dir.absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free
    return free // config.place.count


# ---------------------------------------------------------------------------------------------- speed


@dataclass(frozen=True)
class Speeds:
    """How fast a machine is, for one rank; all but the first in bytes per second.

    Attributes:
        flops: matrix products, in operations per second.
        link: between host and device, each way.
        disk_read: from disk.
        disk_write: to disk.
        memory: read from the device's memory and written to it, together.
        interconnect: that a rank sends to others on its machine.
        network: that a rank sends to other machines, while all ranks of its own do.
        overlaps: whether a rank computes while it sends.
    """

    flops: float
    link: float
    disk_read: float
    disk_write: float
    memory: float
    interconnect: float
    network: float
    overlaps: bool = True


# A card that is not here: an A100 at 40% of its peak, PCIe 4.0 with 16 lanes, a good NVMe disk; NVLink 3 within a
# machine, and between machines 400 Gbit/s per card.
ASSUMED = Speeds(
    flops=125e12, link=20e9, disk_read=3e9, disk_write=2e9, memory=1.5e12, interconnect=300e9, network=50e9
)
_GLOO = 0.25e9  # what a rank sends to another one on the same two cores, by gloo; measured


def measure_speeds(config: Config, device: torch.device, ring: float = 0.0) -> Speeds:
    """Measure the machine at hand for some tenths of a second.

    Args:
        config: number formats and `output_dir` are read. For a card that is only planned for, `ASSUMED` is returned.
        device: where training would run.
        ring: what `measure_ring` has found; 0 if it was not asked.
    """
    if config.device_memory is not None and config.plan:
        return ASSUMED
    dtype = dtype_of(config.numerics.computation)
    size = 1024 if device.type == "cpu" else 8192
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    flops = 2 * size**3 / _seconds(lambda: torch.mm(matrix, matrix), device)
    measured = replace(ASSUMED, flops=flops)
    if device.type == "cuda":
        host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
        on_device = torch.empty_like(host, device=device)
        link = host.nbytes / _seconds(lambda: on_device.copy_(host, non_blocking=True), device)
        measured = replace(measured, link=link)
    with suppress(DiskError, OSError):  # a plan needs no writable folder
        read, write = _disk_speeds(config, device)
        measured = replace(measured, disk_read=read, disk_write=write)
    return _between_ranks(measured, config, device, ring) if config.gpus > 1 else measured


def _between_ranks(speeds: Speeds, config: Config, device: torch.device, ring: float) -> Speeds:
    size, local_count = 2**26 if device.type == "cpu" else 2**30, config.place.local_count
    one, other = torch.zeros(2, size // 2, dtype=torch.uint8, device=device)
    speeds = replace(speeds, memory=size / _seconds(lambda: one.copy_(other), device))
    if device.type == "cpu":  # its ranks share it, and wait for what they send
        shared = {name: getattr(speeds, name) / local_count for name in ("flops", "memory")}
        speeds = replace(speeds, **shared, interconnect=_GLOO, network=_GLOO / local_count, overlaps=False)
    if ring and config.place.machines == 1:
        return replace(speeds, interconnect=ring)
    if ring:  # which is as fast as its slowest part
        return replace(speeds, interconnect=max(ring, speeds.interconnect), network=ring / local_count)
    return speeds


def measure_ring(config: Config, device: torch.device) -> float:
    """Return the bytes per second that a rank sends while all of them gather something.

    Args:
        config: its ranks are read; all of them must call this, and get the same.
        device: of this rank.
    """
    count = config.gpus
    mine = torch.zeros((2**25 if device.type == "cpu" else 2**28) // count, dtype=torch.uint8, device=device)
    everyone = [torch.empty_like(mine) for _ in range(count)]

    def rate() -> float:
        return (count - 1) * mine.nbytes / _seconds(lambda: dist.all_gather(everyone, mine), device)

    return min(by_each_rank(rate))


def _disk_speeds(config: Config, device: torch.device) -> tuple[float, float]:
    """Return the bytes per second read and written past the page cache."""
    memory = aligned_bytes(4 * CHUNK, device)
    array = DiskFile(config.output_dir).allocate(4 * 4 * CHUNK, torch.uint8)

    def each_quarter(transfer: Callable[[int, int, torch.Tensor], None]) -> None:
        for start in range(0, array.numel(), memory.numel()):
            transfer(start, memory.numel(), memory)

    write = array.numel() / _seconds(lambda: each_quarter(array.write), device)
    read = array.numel() / _seconds(lambda: each_quarter(array.read), device)
    return read, write


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the shorter of two times: the first run may have to start something."""
    times = []
    for _ in range(2):
        started = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)
