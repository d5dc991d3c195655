"""How fast a machine is: what it computes, moves and sends per second, measured for some seconds or assumed."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig

from fullft.config.config import Config
from fullft.errors import DiskError
from fullft.memory.measured_work import seconds_of, sums_per_second, training_flops_per_second, updates_per_second
from fullft.memory.plan import Batch
from fullft.model.precision import dtype_of
from fullft.ranks import by_each_rank
from fullft.storage.disk import DiskFile, aligned_bytes
from fullft.storage.tiers import CHUNK
from fullft.storage.workers import THREADS


@dataclass(frozen=True)
class Speeds:
    """How fast a machine is, for one rank; in bytes per second, unless said otherwise.

    Attributes:
        flops: operations of forward and backward per second.
        link: between host and device, each way.
        disk_read: from disk.
        disk_write: to disk.
        memory: read from the device's memory and written to it, together.
        interconnect: that a rank sends to others on its machine.
        network: that a rank sends to other machines, while all ranks of its own do.
        sums: elements per second that the host adds to sums of gradients.
        updates: parameters per second that the optimizer clips and updates; None for as fast as `memory` allows.
        overlaps: whether the device computes while bytes move; a CPU moves them itself.
    """

    flops: float
    link: float
    disk_read: float
    disk_write: float
    memory: float
    interconnect: float
    network: float
    sums: float
    updates: float | None = None
    overlaps: bool = True


# A card that is not here: an A100 at 40% of its peak, PCIe 4.0 with 16 lanes, a good NVMe disk; NVLink 3 within a
# machine, and between machines 400 Gbit/s per card; sums as three threads of two cores here add them.
ASSUMED = Speeds(
    flops=125e12,
    link=20e9,
    disk_read=3e9,
    disk_write=2e9,
    memory=1.5e12,
    interconnect=300e9,
    network=50e9,
    sums=4e9,
)
_DISK_PIECES = 32  # of 16 MiB: a disk may answer for much of what it has not written yet
_GLOO = 0.25e9  # what a rank sends to another one on the same two cores, by gloo; measured


def measure_speeds(
    config: Config, model_config: PreTrainedConfig, batch: Batch, device: torch.device, ring: float = 0.0
) -> Speeds:
    """Measure the machine at hand for some seconds.

    Args:
        config: number formats, ranks and `output_dir` are read. For a card that is only planned for, `ASSUMED` is
            returned.
        model_config: of the model to train.
        batch: the largest micro-batches.
        device: where training would run.
        ring: what `measure_ring` has found; 0 if it was not asked.
    """
    if config.device_memory is not None and config.plan:
        return ASSUMED
    speeds = replace(ASSUMED, flops=_computing(config, model_config, batch, device), sums=sums_per_second(config))
    size = 2**28 if device.type == "cpu" else 2**30  # more than a cache holds
    one, other = torch.zeros(2, size // 2, dtype=torch.uint8, device=device)
    speeds = replace(speeds, memory=size / seconds_of(lambda: one.copy_(other), device))
    if device.type == "cpu":
        speeds = replace(speeds, link=speeds.memory / 2, overlaps=False)
    if device.type == "cuda":
        host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
        on_device = torch.empty_like(host, device=device)
        link = host.nbytes / seconds_of(lambda: on_device.copy_(host, non_blocking=True), device)
        speeds = replace(speeds, link=link)
    with suppress(DiskError, OSError):  # a plan needs no writable folder
        read, write = _disk_speeds(config, device)
        speeds = replace(speeds, disk_read=read, disk_write=write)
    if config.gpus > 1:
        return _between_ranks(speeds, config, device, ring)
    return replace(speeds, updates=updates_per_second(config, device))


def _computing(config: Config, model_config: PreTrainedConfig, batch: Batch, device: torch.device) -> float:
    """Return the model's own operations per second, or those of a large product where that does not fit."""
    with suppress(torch.OutOfMemoryError, MemoryError):
        return training_flops_per_second(config, model_config, batch, device)
    size = 1024 if device.type == "cpu" else 8192
    matrix = torch.ones(size, size, dtype=dtype_of(config.numerics.computation), device=device)
    return 2 * size**3 / seconds_of(lambda: torch.mm(matrix, matrix), device)


def _between_ranks(speeds: Speeds, config: Config, device: torch.device, ring: float) -> Speeds:
    local_count = config.place.local_count
    if device.type == "cpu":  # its ranks share it
        shared = {name: getattr(speeds, name) / local_count for name in ("flops", "link", "memory", "sums")}
        speeds = replace(speeds, **shared, interconnect=_GLOO, network=_GLOO / local_count)
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
        return (count - 1) * mine.nbytes / seconds_of(lambda: dist.all_gather(everyone, mine), device)

    return min(by_each_rank(rate))


def _disk_speeds(config: Config, device: torch.device) -> tuple[float, float]:
    """Return the bytes per second read and written past the page cache, as a run does it: by several threads."""
    pieces = [aligned_bytes(4 * CHUNK, device) for _ in range(THREADS)]
    array = DiskFile(config.output_dir).allocate(_DISK_PIECES * 4 * CHUNK, torch.uint8)

    def all_pieces(transfer: Callable[[int, int, torch.Tensor], None]) -> None:
        def one(number: int) -> None:
            transfer(number * 4 * CHUNK, 4 * CHUNK, pieces[number % THREADS])

        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(one, range(_DISK_PIECES)))

    write = array.numel() / seconds_of(lambda: all_pieces(array.write), device)
    read = array.numel() / seconds_of(lambda: all_pieces(array.read), device)
    return read, write
