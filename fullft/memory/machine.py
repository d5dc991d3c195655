"""What there is: the memory of devices, of the host and of the disk, and how fast bytes move between them.

Owns looking, and measuring for a moment. What a run needs of it is `fit.py`'s business.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fullft.config.config import Config, parse_size
from fullft.errors import DiskError
from fullft.memory.proc import OF_THE_SYSTEM, memory_field
from fullft.memory.snapshot import peak_bytes
from fullft.storage.tiers import CHUNK, DiskFile, aligned_bytes

CONTEXT_BYTES = 2**29  # what a CUDA context takes of a card
CARDS = (10, 16, 24, 40, 48, 80, 141)
_UNKNOWN = sys.maxsize


@dataclass(frozen=True)
class Device:
    """Something to run on.

    Attributes:
        name: for people.
        memory_bytes: that a run may take.
        host_bytes: that it may take of the host's memory besides.
        disk_bytes: that it may take of the disk.
        is_host: whether the device's memory is the host's: then both come out of `memory_bytes`.
    """

    name: str
    memory_bytes: int
    host_bytes: int = _UNKNOWN
    disk_bytes: int = _UNKNOWN
    is_host: bool = False


def find_device(config: Config, device: torch.device) -> Device:
    """Give the device at hand, or the card that `--device_memory` describes.

    Args:
        config: `device_memory`, `plan` and `output_dir` count. The host of a card that is only planned for is unknown.
        device: where training would run.
    """
    if config.device_memory is not None:
        memory = max(0, parse_size(config.device_memory) - CONTEXT_BYTES)
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
    folder = Path(str(config.output_dir)).absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free


def available_host_bytes() -> int:
    """Give the RAM that can be had without swapping, or what the control group leaves of it, whichever is less."""
    return min(_available_ram(), _left_in_cgroup())


def _available_ram() -> int:
    available = memory_field("MemAvailable", OF_THE_SYSTEM)
    if available is not None:
        return available
    # Without it (macOS): all there is, less what we have.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") - peak_bytes(torch.device("cpu"))


def _left_in_cgroup() -> int:
    """Read version 2 of control groups, else version 1; without a limit there is no end."""
    root = Path("/sys/fs/cgroup")
    for folder, limit, usage in (
        (root, "memory.max", "memory.current"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such group, or `max`
            continue
        return most - used + int(stat.get("inactive_file", 0))  # the cache of files is given back
    return sys.maxsize


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


# Of a card that is not here: an A100 at 40% of its peak, PCIe 4.0 with 16 lanes, a good NVMe disk.
ASSUMED = Speeds(flops=125e12, link=20e9, disk_read=3e9, disk_write=2e9)


def measure_speeds(config: Config, device: torch.device) -> Speeds:
    """Measure the machine at hand for some tenths of a second.

    Args:
        config: `device_memory`, `precision` and `output_dir` count; for another card assumptions take their place.
        device: where training would run.
    """
    if config.device_memory is not None and config.plan:
        return ASSUMED
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
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
    except (DiskError, OSError):  # to plan, nothing needs to be writable
        return Speeds(flops, link, ASSUMED.disk_read, ASSUMED.disk_write)


def _disk_speeds(config: Config, device: torch.device) -> tuple[float, float]:
    """Give the bytes per second read and written past the page cache."""
    memory = aligned_bytes(4 * CHUNK, device)
    array = DiskFile(Path(str(config.output_dir))).allocate(4 * 4 * CHUNK, torch.uint8)

    def each_quarter(transfer: Callable[[int, int, torch.Tensor], None]) -> None:
        for start in range(0, array.numel(), memory.numel()):
            transfer(start, memory.numel(), memory)

    write = array.numel() / _seconds(lambda: each_quarter(array.write), device)
    read = array.numel() / _seconds(lambda: each_quarter(array.read), device)
    return read, write


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Take the shorter of two times: the first one may have to start something."""
    times = []
    for _ in range(2):
        started = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)
