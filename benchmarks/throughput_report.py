"""Report the throughput benchmark: two tables, the limit, the comparison of losses, and the picture.

It reads the result files that `throughput.py` has written.
"""

import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from contenders import PEERS, TRAINERS, TRLS, Result, has_trl
from matrix_products import FP32, PACKED, kinds_of_limit
from stopwatch import PARTS
from task import MAX_LENGTH, OURS, ROWS_PER_STEP, Task, is_packed, slug

ISA = "ONEDNN_MAX_CPU_ISA"  # oneDNN's own setting; the bf16 products of all systems are oneDNN's
WARM_UP = 1  # steps that do not count
LIMIT = "limit"
# The largest relative difference of losses on the same rows in the same order. bf16 rounds by 4e-3; a wrong loss is off
# by much more.
TOLERANCE = 5e-3

Results = dict[str, list[Result]]  # of each system, repeat by repeat


def result_file(task: Task, name: str, repeat: int) -> Path:
    """Return the file of a run's result."""
    return task.folder / f"{slug(name)}-{repeat}.json"


def processor() -> str:
    """Describe the processor: its threads, and what they may use."""
    threads = torch.get_num_threads()
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch has none
    kind = " with AMX" if capabilities.get("amx_bf16") else ""
    if os.environ.get(ISA):
        kind = f", held to {os.environ[ISA]}"
    return f"{threads} CPU thread{'s' if threads > 1 else ''}{kind}"


def read(task: Task, repeats: int) -> Results:
    """Read the results of each system, as far as there are any."""
    results = {}
    for name in (*PEERS, *OURS, LIMIT):
        files = [result_file(task, name, repeat) for repeat in range(1, repeats + 1)]
        found = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
        if found:
            results[name] = found
    return results


def speed(result: Result) -> float:
    """Return real tokens per second after the warm-up."""
    if len(result["laps"]) <= WARM_UP:
        sys.exit(f"nothing is left after {WARM_UP} step of warm-up: pass more --steps")
    return float(sum(result["tokens"][WARM_UP:]) / sum(sum(lap.values()) for lap in result["laps"][WARM_UP:]))


def speeds_of(results: Results) -> dict[str, list[float]]:
    """Return each system's speeds, repeat by repeat."""
    return {name: [speed(result) for result in own] for name, own in results.items() if name != LIMIT}


def kind_for(name: str) -> str:
    """Return the kind of limit that a system has."""
    return FP32 if "--precision fp32" in OURS.get(name, "") else PACKED


def limit_of(results: Results, kind: str, figure: str = "tokens_per_second") -> float | None:
    """Return the median of a figure of the limit, or None if it was not measured.

    Args:
        results: those of all systems.
        kind: one of `kinds_of_limit`.
        figure: of `measure_limit`.
    """
    values = [result[kind][figure] for result in results.get(LIMIT, [])]
    return statistics.median(values) if values else None


def ratio(speeds: list[float], others: list[float]) -> float:
    """Return the median of the rounds' ratios: load that slows a whole round slows both."""
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
    """Make the rows of the table of a step's parts. Each part is the median of the repeats' means after the warm-up."""
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
    """Describe each kind of limit, as lines."""
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
        A line for each system with another to be compared with, and whether all agree.
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
    """Draw each system's median speed and range, and the limit: matrix products alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names, all_speeds = zip(*speeds_of(results).items(), strict=True)
    medians = [statistics.median(speeds) for speeds in all_speeds]
    spreads = [(median - min(speeds), max(speeds) - median) for median, speeds in zip(medians, all_speeds, strict=True)]
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.3 * len(names)), layout="constrained")
    colours = ["#1f5a99" if name.startswith("ours") else "#a8a8a8" for name in names]
    ranges: dict[str, Any] = {
        "xerr": list(zip(*spreads, strict=True)),
        "error_kw": {"elinewidth": 0.9, "ecolor": "#404040"},
    }
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
        if row == 0 or kind != kind_for(names[row - 1]):  # the first of the systems with this limit
            axes.annotate(f"limit in {'fp32' if kind == FP32 else 'bf16'}, {limit:,.0f}", (limit, row), xytext=(6, 0),
                          textcoords="offset points", va="center", color="#d9602b", fontsize=9)  # fmt: skip
    axes.set_xlabel("real tokens per second (without padding), median and range")
    axes.grid(axis="x", linewidth=0.5, alpha=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=9)
    figure.suptitle(f"SmolLM2-135M, full fine-tuning on {processor()}", fontsize=11)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _print_table(rows: list[tuple[str, ...]]) -> None:
    print(*(f"| {' | '.join(cells)} |" for cells in rows), sep="\n")


def report(task: Task, repeats: int, picture: Path | None) -> bool:
    """Print the tables, and draw the picture, of the results so far; return whether the losses agree."""
    results = read(task, repeats)
    print(
        f"\nSmolLM2-135M-Instruct, {processor()}: one pass over {task.rows} rows of {task.mean_length} tokens on "
        f"average, {ROWS_PER_STEP} a step (packed: {task.packed_sequences} x {MAX_LENGTH} tokens).\nReal tokens "
        f"per second after {WARM_UP} step, median and range of up to {repeats} runs. x: the median of the rounds' "
        "ratios.\nPeak: of the resident set.\n"
    )
    _print_table(speed_table(results))
    print(
        "\nSeconds of a step. Forward includes the loss, and in ours the head's gradients, which are taken there. "
        "Optimizer includes clipping.\n"
    )
    _print_table(step_table(results))
    lines, agree = compare_losses(results)
    print("", *describe_limit(results, task), *lines, sep="\n")
    if picture is not None:
        plot(results, picture)
    return agree
