"""How fast it trains beside the usual listing, Hugging Face Trainer and TRL, and how fast this processor could.

    python benchmarks/throughput.py --dataset alpaca.json --plot docs/throughput.png   # 90 minutes on two cores
    python benchmarks/throughput.py --dataset alpaca.json --only ours                  # those with this in their names
    python benchmarks/throughput.py --dataset alpaca.json --only ours --profile        # what a step of theirs goes to
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 python benchmarks/throughput.py ...            # all of them kept from using AMX

Owns two tables and one picture: real (non-padding) tokens per second of SmolLM2-135M on the CPU, and the parts of a
step. Every system makes one pass over the same rows with the same AdamW (the compiled peers another one before, since
their lengths vary: they compile at the first two), in a process of its own, and the repeats go round all systems, so
that a slow hour of the machine slows them all. The limit is measured in the same round. A finished run is not repeated
while the program stays as it is, so that a command that was stopped goes on. Ends with 1 if losses differ that should
not.
"""

# ruff: noqa: E402
import argparse
import hashlib
import importlib.util
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}  # everybody trains on the CPU

import datasets
import torch
from contenders import (
    COMMON,
    MAX_LENGTH,
    OURS,
    PEERS,
    ROOT,
    ROWS_ALIKE,
    ROWS_PER_STEP,
    TRAINERS,
    TRLS,
    Result,
    Task,
    is_packed,
    slug,
    train_ours,
    train_peer,
)
from matrix_products import FP32, PACKED, kinds_of_limit, measure_limit
from smollm2_model import WORK, add_dataset_option, build_smollm2
from stopwatch import PARTS
from transformers import AutoTokenizer
from transformers.utils import logging

from fullft.config.parse import parse_config
from fullft.cpu.kernel_caches import KERNEL_CACHES
from fullft.data.batches import load_data
from fullft.data.packing import pack
from fullft.data.sources import load_rows

ISA = "ONEDNN_MAX_CPU_ISA"  # oneDNN's own setting, and everybody's products in bf16 are oneDNN's
WARM_UP = 1  # steps that do not count
LIMIT = "limit"
DRAWS = 1000  # of rows, to choose from: any few leave more gaps when packed than the thousands of a long run
# Of losses on the same rows in the same order, relative: bf16 rounds by 4e-3, a wrong loss is off by much more.
TOLERANCE = 5e-3

Results = dict[str, list[Result]]  # of each system, repeat by repeat

# ---------------------------------------------------------------------------------------------- runs


def prepare(dataset: str, steps: int) -> Task:
    """Choose the rows, once, and write them to a file that every system reads.

    Args:
        dataset: Alpaca rows, any source that `train.py` reads.
        steps: optimizer steps that the rows are enough for.
    """
    source, results = build_smollm2(), WORK / "throughput"
    config = parse_config(["--model", str(source), "--dataset", dataset, "--output_dir", str(results), *COMMON.split()])
    tokenised = load_data(config, AutoTokenizer.from_pretrained(source)).train.rows  # without rows that teach nothing
    count = steps * ROWS_PER_STEP
    if len(tokenised) < count:
        sys.exit(f"--steps {len(tokenised) // ROWS_PER_STEP} is the most here: {dataset} has {len(tokenised)} rows")
    chosen = tokenised.select(sorted(_draw(tokenised["num_tokens"][:], count, steps)))
    lines = "".join(json.dumps(row) + "\n" for row in load_rows(config).select(chosen["row"][:]))
    lengths, targets = chosen["num_tokens"][:], sum(chosen["num_target_tokens"][:])
    mean_context = sum(length**2 for length in lengths) / sum(lengths)
    folder = results / f"{count}-rows-{torch.get_num_threads()}-threads-{_fingerprint(lines)}"
    folder.mkdir(parents=True, exist_ok=True)
    task = Task(source, folder, count, sum(lengths), targets, mean_context)
    task.file.write_text(lines, encoding="utf-8")
    return task


def _draw(lengths: list[int], count: int, steps: int) -> list[int]:
    """Choose rows that are to each system what all of them would be.

    Trainer's length grouping finds rows alike: there are groups of like length, one from each of so many stretches of
    all rows sorted by length. Packing fills the gaps: of many draws the one is taken that packs as densely as all rows,
    or nearly, and into whole steps.
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
        sys.exit(f"--steps {steps}: no {count} rows were found that pack into so many whole steps; take more")
    return min(draws)[1]


def _pack(lengths: list[int]) -> tuple[int, float]:
    """Pack rows; give the number of sequences, and the part of them that is no padding."""
    sequences = len(pack(lengths, MAX_LENGTH))
    return sequences, sum(lengths) / (sequences * MAX_LENGTH)


def _fingerprint(lines: str) -> str:
    """Hash what changes the figures, so that results of unlike programs, libraries, rows or processors never mix."""
    own = (ROOT / "benchmarks" / name for name in ("contenders.py", "matrix_products.py", "stopwatch.py"))
    files = [ROOT / "train.py", *sorted(ROOT.glob("fullft/**/*.py")), *own]
    libraries = [version(name) for name in ("torch", "transformers", "accelerate", *(["trl"] if has_trl() else []))]
    parts = [lines, _processor(), *libraries, *(file.read_text(encoding="utf-8") for file in files)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def has_trl() -> bool:
    """Tell whether TRL is installed: it is optional."""
    return importlib.util.find_spec("trl") is not None


def carry_out(task: Task, name: str, repeat: int, fresh: bool) -> None:
    """Run a system in a process of its own, unless that has been done."""
    file = result_file(task, name, repeat)
    if file.is_file() and not fresh:
        print(f"{repeat}: {name}: done before", flush=True)
        return
    shown = shlex.join(word.removeprefix(f"{ROOT}/") for word in task.flags(name)) if name in OURS else ""
    print(f"{repeat}: {name}" + (f": python train.py {shown}" if shown else ""), flush=True)
    start = time.perf_counter()
    result = _in_own_process(task, name)
    reached = "" if name == LIMIT else f"{speed(result):,.0f} tokens/s; "
    print(f"   {reached}{time.perf_counter() - start:.0f} s with all that is around the steps", flush=True)
    staging = file.with_suffix(".tmp")
    staging.write_text(json.dumps(result), encoding="utf-8")
    staging.replace(file)  # gets its name only when it is complete


def result_file(task: Task, name: str, repeat: int) -> Path:
    """Name the file of a run's result."""
    return task.folder / f"{slug(name)}-{repeat}.json"


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
    """Do the work of one process, and write its result."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    fields = json.loads(task)
    values = Task(**{**fields, "source": Path(fields["source"]), "folder": Path(fields["folder"])})
    if name == LIMIT:
        result: Result = measure_limit(values)
    else:
        result = train_ours(values, name, profiled) if name in OURS else train_peer(values, name)
    out.write_text(json.dumps(result), encoding="utf-8")


# ---------------------------------------------------------------------------------------------- reports


def read(task: Task, repeats: int) -> Results:
    """Give the results that there are, of each system."""
    results = {}
    for name in (*PEERS, *OURS, LIMIT):
        files = [result_file(task, name, repeat) for repeat in range(1, repeats + 1)]
        found = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
        if found:
            results[name] = found
    return results


def speed(result: Result) -> float:
    """Give real tokens per second after the warm-up."""
    if len(result["laps"]) <= WARM_UP:
        sys.exit(f"nothing is left after {WARM_UP} step of warm-up: take more --steps")
    return float(sum(result["tokens"][WARM_UP:]) / sum(sum(lap.values()) for lap in result["laps"][WARM_UP:]))


def speeds_of(results: Results) -> dict[str, list[float]]:
    """Give each system's speeds, repeat by repeat."""
    return {name: [speed(result) for result in own] for name, own in results.items() if name != LIMIT}


def kind_for(name: str) -> str:
    """Say which kind of limit a system has."""
    return FP32 if "--precision fp32" in OURS.get(name, "") else PACKED


def limit_of(results: Results, kind: str, figure: str = "tokens_per_second") -> float | None:
    """Give the median of a figure of the limit.

    Args:
        results: of all systems.
        kind: one of `kinds_of_limit`.
        figure: of `measure_limit`.
    """
    values = [result[kind][figure] for result in results.get(LIMIT, [])]
    return statistics.median(values) if values else None


def ratio(speeds: list[float], others: list[float]) -> float:
    """Give the median of the rounds' ratios: what slows a whole round is in both."""
    return statistics.median(own / other for own, other in zip(speeds, others, strict=False))


def speed_table(results: Results) -> list[tuple[str, ...]]:
    """Make the rows of the table of speeds."""
    rows: list[tuple[str, ...]] = [
        (
            "system",
            "tokens/s",
            "min-max",
            "x Trainer at its best",
            "of the limit",
            "padding",
            "peak, GiB",
            "first loss",
        ),
        ("---", *["---:"] * 7),
    ]
    all_speeds = speeds_of(results)
    trainer = max((all_speeds[name] for name in TRAINERS if name in results), key=statistics.median, default=None)
    for name, speeds in all_speeds.items():
        own, kind, median = results[name], kind_for(name), statistics.median(speeds)
        limit = limit_of(results, kind)
        rows.append(
            (
                name,
                f"{median:,.0f}",
                f"{min(speeds):,.0f}-{max(speeds):,.0f}",
                "" if kind == FP32 else f"{ratio(speeds, trainer):.2f}" if trainer else "?",  # no Trainer in fp32
                f"{median / limit:.0%}" if limit else "?",
                f"{1 - sum(own[0]['tokens']) / sum(own[0]['positions']):.1%}",
                f"{statistics.median(result['peak_bytes'] for result in own) / 2**30:.2f}",
                f"{own[0]['losses'][0]:.4f}",
            )
        )
    if not has_trl():
        rows.extend((name, 'missing: pip install "trl>=1.16"', *[""] * 6) for name in TRLS)
    return rows


def step_table(results: Results) -> list[tuple[str, ...]]:
    """Make the rows of the table of a step's parts: each the median of the repeats' means after the warm-up."""
    rows: list[tuple[str, ...]] = [("system", "tokens", "seconds", *PARTS), ("---", *["---:"] * (2 + len(PARTS)))]
    for name, own in results.items():
        if name == LIMIT:
            continue
        laps = [result["laps"][WARM_UP:] for result in own]
        seconds = {
            part: statistics.median(statistics.mean(lap[part] for lap in repeat) for repeat in laps) for part in PARTS
        }
        tokens = statistics.mean(own[0]["tokens"][WARM_UP:])
        cells = (f"{each:.2f}" for each in (sum(seconds.values()), *seconds.values()))
        rows.append((name, f"{tokens:,.0f}", *cells))
    return rows


def describe_limit(results: Results, task: Task) -> list[str]:
    """Say what the limit is, of each kind."""
    lines = []
    for kind, (tokens, dtype) in kinds_of_limit(task).items():
        limit = limit_of(results, kind)
        if limit is not None:
            speeds = [result[kind]["tokens_per_second"] for result in results[LIMIT]]
            lines.append(
                f"Limit, products of {tokens} tokens in {str(dtype).removeprefix('torch.')} alone: {limit:,.0f} "
                f"tokens/s ({min(speeds):,.0f}-{max(speeds):,.0f}), {limit_of(results, kind, 'gflops'):,.0f} GFLOP/s "
                f"on average, {limit_of(results, kind, 'best_gflops'):,.0f} at best"
            )
    return lines


def compare_losses(results: Results) -> tuple[list[str], bool]:
    """Compare the losses of systems that train on the same micro-batches in the same order.

    Returns:
        A line for each system that has another to be compared with, and whether all agree.
    """
    lines, agree = [], True
    same_work = (
        [next(iter(TRAINERS)), *(name for name in OURS if not is_packed(name))],
        [name for name in OURS if is_packed(name)],
    )
    for names in same_work:
        first, *others = [name for name in names if name in results] or [""]
        for name in others:
            pairs = zip(results[first][0]["losses"], results[name][0]["losses"], strict=True)
            largest = max(abs(a - b) / abs(a) for a, b in pairs)
            agree = agree and largest <= TOLERANCE
            verdict = "" if largest <= TOLERANCE else f": MORE THAN {TOLERANCE:g}"
            lines.append(f"Same work, {first} and {name}: losses differ by at most {largest:.1e}{verdict}")
    return lines, agree


def plot(results: Results, file: Path) -> None:
    """Draw each system's median speed and its range, and the limit: its matrix products alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names, all_speeds = zip(*speeds_of(results).items(), strict=True)
    medians = [statistics.median(speeds) for speeds in all_speeds]
    spreads = [(median - min(speeds), max(speeds) - median) for median, speeds in zip(medians, all_speeds, strict=True)]
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.3 * len(names)), layout="constrained")
    colours = ["#1f5a99" if name.startswith("ours") else "#a8a8a8" for name in names]
    ranges = {"xerr": list(zip(*spreads, strict=True)), "error_kw": {"elinewidth": 0.9, "ecolor": "#404040"}}
    bars = axes.barh(names, medians, color=colours, height=0.68, **ranges)
    axes.bar_label(bars, labels=[f"{median:,.0f}" for median in medians], padding=4, fontsize=9)
    axes.margins(x=0.3, y=0.01)
    axes.invert_yaxis()
    for row, name in enumerate(names):
        kind = kind_for(name)
        limit = limit_of(results, kind)
        if limit is None:
            continue
        axes.vlines(limit, row - 0.5, row + 0.5, color="#d9602b", linewidth=1.3)
        if row == 0 or kind != kind_for(names[row - 1]):  # the first of those that it is for
            axes.annotate(f"limit in {'fp32' if kind == FP32 else 'bf16'}, {limit:,.0f}", (limit, row), xytext=(6, 0),
                          textcoords="offset points", va="center", color="#d9602b", fontsize=9)  # fmt: skip
    axes.set_xlabel("real tokens per second (without padding), median and range")
    axes.grid(axis="x", linewidth=0.5, alpha=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=9)
    figure.suptitle(f"SmolLM2-135M, full fine-tuning on {_processor()}", fontsize=11)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _processor() -> str:
    threads = torch.get_num_threads()
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older torch has none
    kind = " with AMX" if capabilities.get("amx_bf16") else ""
    if os.environ.get(ISA):
        kind = f", held to {os.environ[ISA]}"
    return f"{threads} CPU thread{'s' if threads > 1 else ''}{kind}"


def _print_table(rows: list[tuple[str, ...]]) -> None:
    print(*(f"| {' | '.join(cells)} |" for cells in rows), sep="\n")


def report(task: Task, repeats: int, picture: Path | None) -> bool:
    """Print the tables and draw the picture of what results there are; tell whether the losses agree."""
    results = read(task, repeats)
    print(
        f"\nSmolLM2-135M-Instruct, {_processor()}: one pass over {task.rows} rows of {task.mean_length} tokens on "
        f"average, {ROWS_PER_STEP} a step (packed: {task.packed_sequences} x {MAX_LENGTH} tokens);\nreal tokens "
        f"per second after {WARM_UP} step, median and range of up to {repeats} runs; x: the median of the rounds' "
        "ratios; peak: resident set\n"
    )
    _print_table(speed_table(results))
    print(
        "\nSeconds of a step; forward has the loss in it (and in ours the head's gradients, which are taken there), "
        "optimizer the clipping\n"
    )
    _print_table(step_table(results))
    lines, agree = compare_losses(results)
    print("", *describe_limit(results, task), *lines, sep="\n")
    if picture is not None:
        plot(results, picture)
    return agree


def main() -> None:
    """Carry out what has not been, then report what there is."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    add_dataset_option(parser)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each system, in turn (3)")
    parser.add_argument("--steps", type=int, default=3, help=f"optimizer steps of {ROWS_PER_STEP} rows (3)")
    parser.add_argument("--only", default="", help=f'systems with this in their names, or "{LIMIT}" (default: all)')
    parser.add_argument("--fresh", action="store_true", help="repeat what has been done")
    parser.add_argument("--profile", action="store_true", help="show what a step of ours goes to, operator by operator")
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    for hidden in ("--child", "--task", "--out"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    if arguments.child:
        return run_child(arguments.child, arguments.task, Path(arguments.out), arguments.profile)

    task = prepare(str(arguments.dataset), arguments.steps)
    names = [name for name in (*PEERS, *OURS, LIMIT) if arguments.only in name and (name not in TRLS or has_trl())]
    if arguments.profile:
        if arguments.steps < 3:
            parser.error("--profile records the third step: take more --steps")
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
