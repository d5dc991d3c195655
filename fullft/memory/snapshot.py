"""What the allocator and the operating system say beside the tracker: reserved bytes, the context, the resident set.

Owns figures that no tensor accounts for, and the allocator's own recording for pytorch.org/memory_viz.
"""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fullft.memory.proc import memory_field

SNAPSHOT = "memory_snapshot.pickle"  # torch's own format, for https://pytorch.org/memory_viz
# Where a recording waits until an earlier run's files, which may have one, have been set aside.
_STAGED = ".memory_snapshot.pickle"
_EVENTS = 200_000  # of the recording: some steps of a 7B model


def process_figures(device: torch.device) -> dict[str, int]:
    """Read the peaks of the whole process so far, in bytes.

    Args:
        device: where the model is.

    Returns:
        `resident_peak_bytes` of the process. On CUDA also `allocated_peak_bytes` and `reserved_peak_bytes` of torch's
        allocator, their difference `unused_reserved_bytes`, and `outside_bytes`: what the device holds besides, such as
        the context, NCCL's buffers, and other processes; where torch counts it, `pinned_host_peak_bytes`: host memory
        that is locked for transfers, in blocks rounded up to powers of two.
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
            figures["pinned_host_peak_bytes"] = pinned["allocated_bytes.peak"]
    return figures


def _resident_peak_bytes() -> int:
    peak = memory_field("VmHWM")
    if peak is not None:
        return peak
    # In bytes on macOS, elsewhere in KiB; on Linux it would begin with the peak of whoever started the process.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_bytes(device: torch.device) -> int:
    """Give the peak so far: what tensors took on CUDA, elsewhere the process's resident set."""
    figures = process_figures(device)
    return figures.get("allocated_peak_bytes", figures["resident_peak_bytes"])


@contextmanager
def recording(device: torch.device, folder: Path | None) -> Iterator[None]:
    """Let CUDA's allocator record every allocation with its stack, and write the recording when the body ends.

    It is `SNAPSHOT` at once if the body fails, above all for want of memory; else `publish_recording` makes it so.

    Args:
        device: anything but CUDA records nothing.
        folder: where to; None records nothing.
    """
    if folder is None or device.type != "cuda":
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    torch.cuda.memory._record_memory_history(max_entries=_EVENTS)
    try:
        yield
    except BaseException:
        torch.cuda.memory._dump_snapshot(str(folder / SNAPSHOT))
        raise
    else:
        torch.cuda.memory._dump_snapshot(str(folder / _STAGED))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def publish_recording(folder: Path) -> None:
    """Give a recording that waits, if there is one, its name."""
    if (folder / _STAGED).exists():
        os.replace(folder / _STAGED, folder / SNAPSHOT)
