"""Compare training speed with the usual listing, Hugging Face Trainer and TRL, and with what this processor could do.

    python benchmarks/throughput.py --dataset alpaca.json --plot docs/throughput.png   # 90 minutes on two cores
    python benchmarks/throughput.py --dataset alpaca.json --only ours                  # those with this in their names
    python benchmarks/throughput.py --dataset alpaca.json --only ours --profile        # operators of one of their steps
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 python benchmarks/throughput.py ...            # all systems without AMX

It prints two tables and draws one picture: real (non-padding) tokens per second of SmolLM2-135M on the CPU, and the
parts of a step. Every system makes one pass over the same rows with the same AdamW, in a process of its own. The
compiled peers make an untimed pass before, since their lengths vary, and they compile at the first two.

Systems take turns, and the limit is measured in the same round, so that a slow hour of the machine slows all of them.
Finished runs are not repeated until the program changes, so a stopped command continues. It ends with 1 if losses
differ that should be equal.
"""

# ruff: noqa: E402
import argparse
import hashlib
import json
import os
import random
import shlex
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}  # all systems train on the CPU

import datasets
import torch
from contenders import PEERS, ROWS_ALIKE, TRLS, Result, has_trl, train_ours, train_peer
from matrix_products import measure_limit
from smollm2_model import WORK, add_dataset_option, build_smollm2
from task import COMMON, MAX_LENGTH, OURS, ROOT, ROWS_PER_STEP, Task
from throughput_report import LIMIT, processor, report, result_file, speed
from transformers import AutoTokenizer
from transformers.utils import logging

from fullft.config.parse import parse_config
from fullft.cpu.kernel_caches import KERNEL_CACHES
from fullft.data.load import load_data
from fullft.data.packing import pack
from fullft.data.sources import load_rows

DRAWS = 1000  # to choose from: most draws of few rows leave more gaps when packed than the many rows of a long run

# ---------------------------------------------------------------------------------------------- runs


def prepare(dataset: str, steps: int) -> Task:
    """Choose the rows, and write them to a file that every system reads.

    Args:
        dataset: Alpaca rows, from any source that `train.py` reads.
        steps: optimizer steps that the rows last for.
    """
    source, results = build_smollm2(), WORK / "throughput"
    config = parse_config(["--model", str(source), "--dataset", dataset, "--output_dir", str(results), *COMMON.split()])
    tokenised = load_data(config, AutoTokenizer.from_pretrained(source)).train.rows  # without rows that teach nothing
    count = steps * ROWS_PER_STEP
    if len(tokenised) < count:
        sys.exit(f"--steps {len(tokenised) // ROWS_PER_STEP} is the most here: {dataset} has {len(tokenised)} rows")
    chosen = tokenised.select(sorted(_draw(tokenised["num_tokens"][:], count, steps)))
    rows = load_rows(config)
    lines = "".join(json.dumps(rows[number]) + "\n" for number in chosen["row"][:])
    lengths, targets = chosen["num_tokens"][:], sum(chosen["num_target_tokens"][:])
    mean_context = sum(length**2 for length in lengths) / sum(lengths)
    folder = results / f"{count}-rows-{torch.get_num_threads()}-threads-{_fingerprint(lines)}"
    folder.mkdir(parents=True, exist_ok=True)
    task = Task(source, folder, count, sum(lengths), targets, mean_context)
    task.file.write_text(lines, encoding="utf-8")
    return task


def _draw(lengths: list[int], count: int, steps: int) -> list[int]:
    """Choose a few rows that are to each system like all of them.

    Trainer's length grouping needs rows of similar length. So the rows are sorted by length and cut into stretches, and
    a group of neighbours is drawn from each. Packing needs rows that fill sequences. So of many draws that pack into
    whole steps, the one is chosen whose density is nearest to that of all rows.

    Args:
        lengths: tokens of each row.
        count: rows to choose.
        steps: optimizer steps that they are to fill.

    Returns:
        The indices of the rows.
    """
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    starts, groups = range(0, len(lengths) - ROWS_ALIKE + 1, ROWS_ALIKE), count // ROWS_ALIKE
    bounds = [len(starts) * number // groups for number in range(groups + 1)]
    _, density = _pack(lengths)
    draws = []
    for seed in range(DRAWS):
        chance = random.Random(seed)
        picked = [starts[chance.randrange(first, end)] for first, end in zip(bounds, bounds[1:], strict=False)]
        draw = [row for start in picked for row in by_length[start : start + ROWS_ALIKE]]
        sequences, own_density = _pack([lengths[row] for row in draw])
        if sequences % steps == 0:
            draws.append((abs(density - own_density), draw))
    if not draws:
        sys.exit(f"--steps {steps}: no draw of {count} rows packs into that many whole steps; choose more steps")
    return min(draws)[1]


def _pack(lengths: list[int]) -> tuple[int, float]:
    """Pack rows, and return the number of sequences and the share of them that is filled."""
    sequences = len(pack(lengths, MAX_LENGTH))
    return sequences, sum(lengths) / (sequences * MAX_LENGTH)


def _fingerprint(lines: str) -> str:
    """Hash everything that changes the figures, so that results of different programs or machines never mix."""
    own = (ROOT / "benchmarks" / name for name in ("task.py", "contenders.py", "matrix_products.py", "stopwatch.py"))
    files = [ROOT / "train.py", *sorted(ROOT.glob("fullft/**/*.py")), *own]
    libraries = [version(name) for name in ("torch", "transformers", "accelerate", *(["trl"] if has_trl() else []))]
    parts = [lines, processor(), *libraries, *(file.read_text(encoding="utf-8") for file in files)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def carry_out(task: Task, name: str, repeat: int, fresh: bool) -> None:
    """Run a system in a process of its own, unless the run is finished."""
    file = result_file(task, name, repeat)
    if file.is_file() and not fresh:
        print(f"{repeat}: {name}: done before", flush=True)
        return
    shown = shlex.join(word.removeprefix(f"{ROOT}/") for word in task.flags(name)) if name in OURS else ""
    print(f"{repeat}: {name}" + (f": python train.py {shown}" if shown else ""), flush=True)
    start = time.perf_counter()
    result = _in_own_process(task, name)
    reached = "" if name == LIMIT else f"{speed(result):,.0f} tokens/s; "
    print(f"   {reached}{time.perf_counter() - start:.0f} s, with everything around the steps", flush=True)
    staging = file.with_suffix(".tmp")
    staging.write_text(json.dumps(result), encoding="utf-8")
    staging.replace(file)  # the file gets its name only when it is complete


def _in_own_process(task: Task, name: str, *more: str) -> Result:
    out = task.folder / "child.json"
    given = ("--dataset", str(task.file), "--task", json.dumps(asdict(task), default=str), "--out", str(out))
    command = [__file__, "--child", name, *given, *more]
    settings = KERNEL_CACHES if name in OURS else {}  # as `train.py` sets them
    done = subprocess.run([sys.executable, *command], env=settings | os.environ, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    result: Result = json.loads(out.read_text(encoding="utf-8"))
    out.unlink()
    return result


def run_child(name: str, task: str, out: Path, profiled: bool) -> None:
    """Train one system, or measure the limit, and write the result."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    fields = json.loads(task)
    values = Task(**{**fields, "source": Path(fields["source"]), "folder": Path(fields["folder"])})
    if name == LIMIT:
        result: Result = measure_limit(values)
    else:
        result = train_ours(values, name, profiled) if name in OURS else train_peer(values, name)
    out.write_text(json.dumps(result), encoding="utf-8")


def main() -> None:
    """Carry out the runs that are not finished, then report all that are."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    add_dataset_option(parser)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each system, in turn (3)")
    parser.add_argument("--steps", type=int, default=3, help=f"optimizer steps of {ROWS_PER_STEP} rows (3)")
    parser.add_argument(
        "--only", nargs="+", default=[""], help=f'systems with one of these in their names, or "{LIMIT}" (all)'
    )
    parser.add_argument("--fresh", action="store_true", help="repeat finished runs")
    parser.add_argument("--profile", action="store_true", help="show the operators of one of our steps")
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    for hidden in ("--child", "--task", "--out"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    if arguments.child:
        return run_child(arguments.child, arguments.task, Path(arguments.out), arguments.profile)

    task = prepare(str(arguments.dataset), arguments.steps)
    names = [name for name in (*PEERS, *OURS, LIMIT) if name not in TRLS or has_trl()]
    names = [name for name in names if any(part in name for part in arguments.only)]
    if arguments.profile:
        if arguments.steps < 3:
            parser.error("--profile records the third step: pass --steps 3 or more")
        for name in OURS:
            if name in names:
                print(f"\n{name}\n{_in_own_process(task, name, '--profile')['profile']}", flush=True)
        return
    for repeat in range(1, arguments.repeats + 1):
        for name in names:
            carry_out(task, name, repeat, arguments.fresh)
    sys.exit(not report(task, arguments.repeats, arguments.plot))


if __name__ == "__main__":
    main()
