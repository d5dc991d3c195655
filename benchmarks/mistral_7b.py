"""Train every parameter of a Mistral-7B on a machine of 24 GiB: measure how much memory that takes, and how much time.

    python benchmarks/mistral_7b.py                      # both modes: 65 GB of free disk, half an hour on two cores
    python benchmarks/mistral_7b.py --weights streamed   # only the mode with the weights on disk too
    python benchmarks/mistral_7b.py --size tiny          # the same with a model of a few MB, in seconds

It writes a checkpoint of random bf16 weights in the model's shape, and deletes it afterwards, whatever happens. Each
mode trains in a process of its own, with steps as `train.py` takes them. Every step learns the same rows, so the loss
must fall. Afterwards every parameter is compared with its first value.

It prints peaks of memory, and a table of the last step's phases next to the limit of the machine: its matrix products,
optimizer arithmetic and disk, measured in the same run. Linux only. GiB is 2^30 bytes, GB is 10^9.
"""

# ruff: noqa: E402
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed, as for train.py

from mistral_7b_phases import SAMPLER

SAMPLER.start()  # before anything is imported that takes memory

import argparse
import os
import shutil
import signal
import subprocess
import time

os.environ["HF_HUB_OFFLINE"] = "1"

from mistral_7b_limit import measure_apart
from mistral_7b_model import MODEL, PLACES, SIZES, WORK, require_disk, write_checkpoint
from mistral_7b_report import report_time
from mistral_7b_training import results_file, train


def main() -> None:
    """Write the checkpoint, train in each mode, and delete it."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--weights", choices=(*PLACES, "both"), default="both", help="where the weights are (both in turn)"
    )
    parser.add_argument("--size", choices=tuple(SIZES), default="7b", help="size of the model (7b)")
    parser.add_argument(
        "--steps", type=int, default=2, help="optimizer steps (2); the last one is compared with the limit"
    )
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)  # the process of one mode
    arguments = parser.parse_args()
    folder = WORK / ("mistral-7b" if arguments.size == "7b" else f"mistral-7b-{arguments.size}")
    if arguments.train:
        return train(arguments.size, arguments.weights, folder, arguments.steps)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    WORK.mkdir(exist_ok=True)
    for weights in PLACES if arguments.weights == "both" else [arguments.weights]:
        shutil.rmtree(folder, ignore_errors=True)
        print(f"\n{MODEL}'s shape, size {arguments.size}, weights {weights}, offload {PLACES[weights]}", flush=True)
        require_disk(arguments.size, weights, folder)
        try:
            rates = measure_apart(arguments.size)
            start = time.perf_counter()
            write_checkpoint(folder, arguments.size)
            print(f"Checkpoint written in {time.perf_counter() - start:.0f} s", flush=True)
            command = [sys.executable, __file__, "--train", "--weights", weights, "--size", arguments.size]
            subprocess.run([*command, "--steps", str(arguments.steps)], check=True)
            shutil.rmtree(folder, ignore_errors=True)
            rates = rates.best(measure_apart(arguments.size))
            report_time(arguments.size, folder, rates)
        except subprocess.CalledProcessError as error:
            sys.exit(error.returncode)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            results_file(folder).unlink(missing_ok=True)
    return None


if __name__ == "__main__":
    main()
