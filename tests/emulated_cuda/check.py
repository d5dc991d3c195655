"""Builds the emulated device, and runs on it the tests that need a GPU and those of the device. For `make emulated`."""

import os
import sys

from emulated_cuda.build import build, why_not

# Two at a time, as on the smallest machines that run it.
PYTEST = ["pytest", "-p", "emulated_cuda.plugin", "-m", "gpu or emulated", "--numprocesses", "2"]


def main() -> None:
    """Run pytest, with more of its options from the command line; without a device, only say why."""
    if (reason := why_not()) is not None:
        print(f"Skipped: {reason}")
        return
    build()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.execv(sys.executable, [sys.executable, "-m", *PYTEST, *sys.argv[1:]])


if __name__ == "__main__":
    main()
