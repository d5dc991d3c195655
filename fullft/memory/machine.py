"""The machine to plan for: the memory of its device, host and disk. How fast it is, says `speeds.py`.

Where several ranks run on it, each has its share of what they have in common.
"""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fullft.config.config import Config
from fullft.hardware import available_host_bytes

CONTEXT_BYTES = 2**29  # what a CUDA context takes of a card
# What is left free on a card besides. Workspaces of cuBLAS and of cuBLASLt are 32 MiB each on Hopper, and 8 MiB or less
# elsewhere. 2% are for what the caching allocator rounds up and cannot use of its segments.
_WORKSPACES = 2**26
_FRAGMENTS = 0.02
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


def margin_bytes(peak_bytes: int) -> int:
    """Return what a run takes of a card besides its tensors: workspaces of kernels, and fragments.

    Args:
        peak_bytes: of its tensors.
    """
    return _WORKSPACES + int(_FRAGMENTS * peak_bytes)


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
