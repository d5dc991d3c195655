"""The machine to plan for: the memory of its device, host and disk, and how fast bytes move between them."""

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fullft.config.config import Config
from fullft.errors import DiskError
from fullft.hardware import available_host_bytes
from fullft.model.precision import dtype_of
from fullft.storage.disk import DiskFile, aligned_bytes
from fullft.storage.tiers import CHUNK

CONTEXT_BYTES = 2**29  # what a CUDA context takes of a card
CARDS = (10, 16, 24, 40, 48, 80, 141)
_UNKNOWN = sys.maxsize


@dataclass(frozen=True)
class Device:
    """Something to run on.

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
    """Return the device at hand, or the card that `--device_memory` describes.

    Args:
        config: `device_memory`, `plan` and `output_dir` are read. The host of a card that is only planned for is
            unknown.
        device: where training would run.
    """
    if config.device_memory_bytes is not None:
        memory = max(0, config.device_memory_bytes - CONTEXT_BYTES)
        if config.plan:
            return Device(f"{config.device_memory} card", memory)
        return Device(f"{config.device_memory} card", memory, available_host_bytes(), _free_disk(config))
    if device.type == "cuda":
        name, free = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[0]
        return Device(name, free, available_host_bytes(), _free_disk(config))
    if device.type == "mps":
        memory = torch.mps.recommended_max_memory()
        return Device("this Mac's GPU", memory, available_host_bytes() - memory, _free_disk(config))
    return Device("this machine (CPU)", available_host_bytes(), 0, _free_disk(config), is_host=True)


def cards() -> list[Device]:
    """List the usual cards: nominal GiB, less the context."""
    return [Device(f"{size} GB card", size * 2**30 - CONTEXT_BYTES) for size in CARDS]


def _free_disk(config: Config) -> int:
    folder = config.output_dir.absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free


# ---------------------------------------------------------------------------------------------- speed


@dataclass(frozen=True)
class Speeds:
    """How fast a machine is.

    Attributes:
        flops: matrix products, in operations per second.
        link: between host and device, in bytes per second each way.
        disk_read: in bytes per second.
        disk_write: in bytes per second.
    """

    flops: float
    link: float
    disk_read: float
    disk_write: float


# A card that is not here: an A100 at 40% of its peak, PCIe 4.0 with 16 lanes, a good NVMe disk.
ASSUMED = Speeds(flops=125e12, link=20e9, disk_read=3e9, disk_write=2e9)


def measure_speeds(config: Config, device: torch.device) -> Speeds:
    """Measure the machine at hand for some tenths of a second.

    Args:
        config: number formats and `output_dir` are read. For a card that is only planned for, `ASSUMED` is returned.
        device: where training would run.
    """
    if config.device_memory is not None and config.plan:
        return ASSUMED
    dtype = dtype_of(config.numerics.computation)
    size = 1024 if device.type == "cpu" else 8192
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    flops = 2 * size**3 / _seconds(lambda: torch.mm(matrix, matrix), device)
    link = ASSUMED.link
    if device.type == "cuda":
        host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
        on_device = torch.empty_like(host, device=device)
        link = host.nbytes / _seconds(lambda: on_device.copy_(host, non_blocking=True), device)
    try:
        return Speeds(flops, link, *_disk_speeds(config, device))
    except (DiskError, OSError):  # a plan needs no writable folder
        return Speeds(flops, link, ASSUMED.disk_read, ASSUMED.disk_write)


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
