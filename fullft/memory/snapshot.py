"""CUDA's own recording of every allocation, for pytorch.org/memory_viz."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fullft.saving.output_dir import SNAPSHOT

# Where a recording waits until an earlier run's files, which may have one, have been set aside.
_STAGED = ".memory_snapshot.pickle"
_EVENTS = 200_000  # of the recording: some steps of a 7B model


@contextmanager
def recording(device: torch.device, folder: Path | None) -> Iterator[None]:
    """Record every allocation of CUDA's with its stack, and write the recording when the body ends.

    If the body fails, above all for lack of memory, the file has its final name at once; else `publish_recording` gives
    it that name.

    Args:
        device: anything but CUDA records nothing.
        folder: to write to; None records nothing.
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
    """Rename a waiting recording, if there is one, to its final name."""
    if (folder / _STAGED).exists():
        os.replace(folder / _STAGED, folder / SNAPSHOT)
