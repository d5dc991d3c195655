"""Memory figures from Linux's /proc. It imports almost nothing, so a process can watch itself from its start."""

from contextlib import suppress
from pathlib import Path

OF_THIS_PROCESS, OF_THE_SYSTEM = Path("/proc/self/status"), Path("/proc/meminfo")


def memory_field(name: str, file: Path = OF_THIS_PROCESS) -> int | None:
    """Read a field, in bytes.

    Args:
        name: such as `VmHWM`, or `MemAvailable` of the system.
        file: of lines such as `VmHWM:   1024 kB`.

    Returns:
        None where there is no such file or field: not on Linux.
    """
    with suppress(OSError):
        for line in file.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None
