"""Runs train.py on the emulated device, and prints at the end what was counted and found.

PYTHONPATH=tests python -m emulated_cuda --max_steps 3 ...
"""

import atexit
import os
import runpy
import sys
from pathlib import Path

from emulated_cuda import library
from emulated_cuda.build import why_not
from emulated_cuda.load import load

ROOT = Path(__file__).parents[2]


def _report() -> None:
    lines = [library.describe(), *(f"{number} x {name}" for name, number in sorted(library.counts().items()))]
    print(*lines, sep="\n", file=sys.stderr)


def main() -> None:
    """Run train.py with the words of the command line."""
    if (reason := why_not()) is not None:
        sys.exit(reason)
    load()
    atexit.register(_report)
    if (limit := os.environ.get("EMULATED_CUDA_MEMORY")) is not None:
        from fullft.config.sizes import parse_size

        library.call("set_limit", parse_size(limit))
    sys.argv[0] = str(ROOT / "train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
