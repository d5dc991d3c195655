"""Measure the phases of `mistral_7b.py`'s processes: seconds, bytes from and to the disk, and peaks of memory.

It imports next to nothing, so that a process can watch its memory from its very start. Linux only.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fullft.cpu.proc import memory_field

GIB, GB = 2**30, 10**9


class Sampler(threading.Thread):
    """Samples the process's anonymous memory every 50 ms. Pages of mapped files are not part of it.

    `VmHWM`, the operating system's own high-water mark, also counts such pages.

    Attributes:
        peaks: the largest sample of each phase, in bytes.
        phase: the name of the current one.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[str, int] = {}
        self.phase = "start"

    def run(self) -> None:
        """Sample for as long as the process lives."""
        while True:
            self.sample()
            time.sleep(0.05)

    def sample(self) -> None:
        """Take one sample."""
        phase = self.phase
        self.peaks[phase] = max(self.peaks.get(phase, 0), memory_field("RssAnon") or 0)


SAMPLER = Sampler()  # to be started before anything is imported that takes memory


@dataclass
class Phase:
    """The costs of one phase.

    Attributes:
        seconds: on the clock.
        cpu: seconds of the process on all cores.
        read: bytes from the disk.
        written: bytes to the disk.
    """

    seconds: float = 0.0
    cpu: float = 0.0
    read: int = 0
    written: int = 0


@contextmanager
def measured(name: str) -> Iterator[Phase]:
    """Measure the body as a phase. The sampler keeps the peak of memory under the phase's name."""
    phase, SAMPLER.phase = Phase(), name
    (read, written), start, cpu = _io_bytes(), time.perf_counter(), time.process_time()
    yield phase
    phase.seconds, phase.cpu = time.perf_counter() - start, time.process_time() - cpu
    SAMPLER.sample()
    phase.read, phase.written = (after - before for after, before in zip(_io_bytes(), (read, written), strict=True))
    SAMPLER.phase = "between"


def _io_bytes() -> tuple[int, int]:
    """Return the bytes that this process has read from and written to the disk so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"]), int(fields["write_bytes"])


def report_memory() -> None:
    """Print the peaks of memory."""
    own = {name: peak for name, peak in SAMPLER.peaks.items() if name != "between"}
    peaks = ", ".join(f"{name} {peak / GIB:.2f}" for name, peak in own.items())
    print(f"\nPeak anonymous memory: {max(SAMPLER.peaks.values()) / GIB:.2f} GiB ({peaks})")
    print(f"VmHWM, with pages of files: {(memory_field('VmHWM') or 0) / GIB:.2f} GiB")
