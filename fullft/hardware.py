"""The hardware: which device computes, how fast it can be, how much memory is free, and what this process has taken."""

import os
import resource
import sys
from pathlib import Path

import torch

from fullft.config.ranks import ALONE, Place
from fullft.cpu.proc import OF_THE_SYSTEM, memory_field
from fullft.errors import OptionsError
from fullft.storage.locked import peak_registered_bytes

# Dense bf16 matrix products per second with fp32 accumulation, in operations. Source: the vendor's data sheets.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "L4": 121e12,
    "A10G": 70e12,
}


def pick_device(place: Place = ALONE) -> torch.device:
    """Choose this machine's accelerator, one for each rank on it, or the CPU where there is none.

    Args:
        place: this process among the ranks.

    Raises:
        OptionsError: there are too few of them.
    """
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if place.count == 1 or device.type == "cpu":
        return device
    if device.type != "cuda":
        raise OptionsError(f"several ranks need CUDA devices or CPUs, and this machine has {device.type}: use one rank")
    index, available = place.local_rank, torch.cuda.device_count()
    if available == 1 and os.environ.get("SLURM_LOCALID") == str(index):
        index = 0  # srun can give each of its tasks a GPU, and then shows it no other one
    if index >= available:
        raise OptionsError(
            f"{place.local_count} ranks were started on this machine, which has {available} "
            f"GPU{'s' if available > 1 else ''}: start one for each"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def peak_flops(device: torch.device) -> float | None:
    """Return a GPU's peak in bf16, in operations per second, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for card, flops in PEAK_FLOPS.items() if card in name), None)


# ---------------------------------------------------------------------------------------------- what is taken


def process_figures(device: torch.device) -> dict[str, int]:
    """Read the peaks of the whole process so far, in bytes.

    Args:
        device: where the model is.

    Returns:
        `resident_peak_bytes` of the process. On CUDA also `allocated_peak_bytes` and `reserved_peak_bytes` of torch's
        allocator, their difference `unused_reserved_bytes`, and `outside_bytes`: what the device holds besides, such as
        the context, NCCL's buffers, and other processes; where torch counts it, `pinned_host_peak_bytes`: host memory
        that is locked for transfers.
    """
    figures = {"resident_peak_bytes": _resident_peak_bytes()}
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        free, total = torch.cuda.mem_get_info(device)
        figures |= {
            "allocated_peak_bytes": allocated,
            "reserved_peak_bytes": reserved,
            "unused_reserved_bytes": reserved - allocated,
            "outside_bytes": total - free - torch.cuda.memory_reserved(device),
        }
        # Older versions of torch do not count it.
        pinned = torch.cuda.host_memory_stats() if hasattr(torch.cuda, "host_memory_stats") else {}
        if "allocated_bytes.peak" in pinned:
            figures["pinned_host_peak_bytes"] = pinned["allocated_bytes.peak"] + peak_registered_bytes()
    return figures


def _resident_peak_bytes() -> int:
    peak = memory_field("VmHWM")
    if peak is not None:
        return peak
    # In bytes on macOS, elsewhere in KiB. On Linux it would begin with the peak of the parent process.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_bytes(device: torch.device) -> int:
    """Return the peak so far: of tensors on CUDA, elsewhere of the process's resident set."""
    figures = process_figures(device)
    return figures.get("allocated_peak_bytes", figures["resident_peak_bytes"])


# ---------------------------------------------------------------------------------------------- what is free


def available_host_bytes() -> int:
    """Return the RAM that can be had without swapping, or what the control group leaves of it if that is less."""
    return min(_available_ram(), _left_in_cgroup())


def _available_ram() -> int:
    available = memory_field("MemAvailable", OF_THE_SYSTEM)
    if available is not None:
        return available
    # macOS has no such field: all there is, less what this process has.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") - peak_bytes(torch.device("cpu"))


def _left_in_cgroup() -> int:
    """Read the limit of version 2 of control groups, else of version 1."""
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
        return most - used + int(stat.get("inactive_file", 0))  # the cache of files is given back when needed
    return sys.maxsize
