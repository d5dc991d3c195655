"""Train a real model on real rows with one command: SmolLM2-135M-Instruct on an Alpaca file, on two CPU cores.

    python benchmarks/smollm2.py --dataset alpaca.json                # one epoch
    python benchmarks/smollm2.py --dataset alpaca.json --max_steps 3  # any option of train.py is passed on

The training is `train.py`'s, in a process of its own. The command of that process is printed first. At the end comes a
table of losses, speed, memory and time.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from smollm2_model import WORK, add_dataset_option, build_smollm2

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = WORK / "full-ft-smollm2-135m"

# The defaults of train.py, except for one epoch (60 steps for 999 rows) and two options that keep it under 20 minutes.
# CPUs compute fp32 faster than autocast: 95 tokens per core and second instead of 55. 256 tokens hold seven of ten rows
# whole.
OPTIONS = ["--num_train_epochs", "1", "--precision", "fp32", "--max_length", "256"]
OPTIONS += ["--save_strategy", "no", "--overwrite_output_dir"]


def main() -> None:
    """Build the model if it is missing, train it, and print the results."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0], allow_abbrev=False)
    add_dataset_option(parser)
    parser.add_argument(
        "--output_dir", default=OUTPUT, help="where to write (default: benchmarks/work/full-ft-smollm2-135m)"
    )
    arguments, more = parser.parse_known_args()
    output_dir = Path(arguments.output_dir)
    command = ["train.py", "--model", str(build_smollm2()), "--dataset", str(arguments.dataset)]
    command += ["--output_dir", str(output_dir), *OPTIONS, *more]
    print(
        "python",
        shlex.join(argument.removeprefix(f"{ROOT}/") for argument in command),
        flush=True,
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]])
    if done.returncode:
        sys.exit(done.returncode)
    print(f"\n{_table(output_dir, time.perf_counter() - start)}")


def _table(output_dir: Path, seconds: float) -> str:
    """Make the table from the files that the run wrote.

    Args:
        output_dir: the run's.
        seconds: of the whole command.
    """
    results = json.loads((output_dir / "train_results.json").read_text(encoding="utf-8"))
    log = [json.loads(line) for line in (output_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = [record for record in log if "eval_loss" in record]
    lines = [("", "before", "after")]
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        lines += [
            ("held-out loss", f"{first['eval_loss']:.4f}", f"{last['eval_loss']:.4f}"),
            ("held-out perplexity", f"{first['eval_perplexity']:.2f}", f"{last['eval_perplexity']:.2f}"),
        ]
    lines += [
        ("training loss, first and last step", f"{results['first_loss']:.4f}", f"{results['last_loss']:.4f}"),
        ("", "", ""),
        ("steps", f"{results['steps']}", ""),
        ("tokens trained, padding excluded", f"{results['train_tokens']:,}", ""),
        ("tokens/s", f"{results['tokens_per_second']:,.0f}", ""),
        ("peak memory (resident set on a CPU)", f"{results['peak_memory_bytes'] / 2**30:.2f} GiB", ""),
        ("minutes of training", f"{results['train_seconds'] / 60:.1f}", ""),
        ("minutes in all", f"{seconds / 60:.1f}", ""),
    ]
    return "\n".join(f"{name:36} {before:>10} {after:>10}".rstrip() for name, before, after in lines)


if __name__ == "__main__":
    main()
