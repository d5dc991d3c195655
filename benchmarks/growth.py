"""Measure how speed and memory of a step change with sequence length, batch size, layers and width, each by itself.

    python benchmarks/growth.py                    # four tables and docs/growth.png, ten minutes on two cores
    python benchmarks/growth.py --axis length      # one of the tables
    python benchmarks/growth.py --quick            # small sizes, for a trial of a minute

It prints four tables and draws one picture, on the CPU. The largest model takes 15 GiB. A point is a run of `train.py`
on a Llama with random weights, in a process of its own. One size at a time differs from the base, which all four axes
share. Rows are cut at the length of the point, so that there is no padding and no packing.

Options are `train.py`'s defaults, except for one micro-batch a step, no checkpointing and no offloading: none of them
then depends on the memory that happens to be free. In each run one step warms up, and the median of three counts. Peaks
are those of `memory.json`, the tracker's next to the plan's.

GFLOP/s are tokens per second times `flops_per_token` of `model/parts.py`. As in papers, that counts attention over the
whole sequence. Ours skips nearly all of the half that causality hides, so that long sequences look faster.
"""

# ruff: noqa: E402
import argparse
import contextlib
import io
import json
import multiprocessing
import os
import random
import shutil
import statistics
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from smollm2_model import WORK

ROOT = Path(__file__).resolve().parents[1]
FOLDER = WORK / "growth"  # files of the current point, removed after it
sys.path.insert(0, str(ROOT))  # the package need not be installed, as for train.py
os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "HF_DATASETS_CACHE": str(FOLDER / "cache")}

from fullft.cpu.kernel_caches import limit_kernel_caches

limit_kernel_caches()  # as `train.py` does before it imports torch

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import train
from fullft.config.options import DEMO_FOLDER
from fullft.config.parse import parse_config
from fullft.model.parts import count_parameters, flops_per_token
from fullft.model.source import DEMO_MODEL
from fullft.run.evaluation import Samples

# All axes pass through the base; the widest model has 1.0B parameters.
AXES: dict[str, tuple[int, ...]] = {
    "length": (256, 512, 1024, 2048, 4096),
    "batch": (1, 2, 4, 8, 16),
    "layers": (2, 4, 8, 16, 32),
    "width": (256, 512, 1024, 2048, 3072),
}
TITLES = {"length": "tokens of a sequence", "batch": "sequences of a batch", "layers": "layers", "width": "width"}
TIMED_STEPS = 3  # after one that warms up
FLAT, STRAIGHT = 1.25, 0.05  # the most that still counts: highest / lowest speed, and a peak's distance from its line
GIB = 2**30
BLUE, ORANGE, GREY = "#1f5a99", "#d9602b", "#9a9a9a"

# ---------------------------------------------------------------------------------------------- points


@dataclass(frozen=True)
class Point:
    """The sizes of a step. The defaults are the base.

    Attributes:
        length: tokens of each sequence.
        batch: sequences of a step.
        layers: decoder layers.
        width: of a token's vector. A head has 64 of it, and the MLP is 8/3 as wide, as in Llama.
    """

    length: int = 512
    batch: int = 2
    layers: int = 8
    width: int = 512

    def __str__(self) -> str:
        """Write the sizes."""
        return f"length {self.length}, batch {self.batch}, layers {self.layers}, width {self.width}"

    @property
    def model_config(self) -> LlamaConfig:
        """The model's config, the same for every length and batch."""
        return LlamaConfig(
            vocab_size=16_384,
            hidden_size=self.width,
            intermediate_size=-(-8 * self.width // 3 // 256) * 256,
            num_hidden_layers=self.layers,
            num_attention_heads=self.width // 64,
            max_position_embeddings=max(AXES["length"]),
            bos_token_id=0,  # of the demo's tokenizer
            eos_token_id=0,
        )

    @property
    def flags(self) -> list[str]:
        """The command line of `train.py`."""
        paths = [f"--model={FOLDER / 'model'}", f"--dataset={FOLDER / 'rows.jsonl'}", f"--output_dir={FOLDER / 'run'}"]
        options = (
            f"--max_length {self.length} --per_device_train_batch_size {self.batch} --gradient_accumulation_steps 1 "
            f"--max_steps {1 + TIMED_STEPS} --logging_steps 1 --val_size 0 --eval_strategy no --save_strategy no "
            "--activation_checkpointing none --offload none"
        )
        return [*paths, *options.split()]


@dataclass(frozen=True)
class Result:
    """The figures of a run.

    Attributes:
        point: its sizes.
        parameters: the model's.
        flops: operations of a token, forward and backward.
        speed: tokens per second, the median of the timed steps.
        measured: the tracker's peak of the worst step [bytes].
        planned: the same as planned before the weights were loaded [bytes].
    """

    point: Point
    parameters: int
    flops: float
    speed: float
    measured: int
    planned: int

    @property
    def size(self) -> str:
        """The model's size as people write it: 0.5B, 135M."""
        return f"{self.parameters / 1e9:.1f}B" if self.parameters >= 1e9 else f"{self.parameters / 1e6:.0f}M"

    @property
    def gflops(self) -> float:
        """The operations per second, in 10^9."""
        return self.speed * self.flops / 1e9


# ---------------------------------------------------------------------------------------------- one run


def measure(point: Point) -> Result:
    """Train at a point. Call it in a fresh process, with unused memory, threads and caches."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    # Work around the steps is not measured, and takes longer than they do with a large model.
    vars(train).update(export_model=lambda *_: None, check_export=lambda *_: "")
    Samples.complete = lambda *_, **__: None  # type: ignore[method-assign]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        parameters, flops = write_model(point)
        write_rows(point)
        train.main(parse_config(point.flags))
    log = [json.loads(line) for line in (FOLDER / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(step["num_tokens"] == point.batch * point.length for step in log), "a row is not as long as stated"
    speed = statistics.median(step["tokens_per_second"] for step in log[-TIMED_STEPS:])
    memory = json.loads((FOLDER / "run" / "memory.json").read_text(encoding="utf-8"))
    shutil.rmtree(FOLDER)
    return Result(point, parameters, flops, speed, memory["measured"]["peak_bytes"], memory["planned"]["peak_bytes"])


def write_model(point: Point) -> tuple[int, float]:
    """Save a model of random weights and the demo's tokenizer; return its parameters and the operations of a token."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(point.model_config, dtype=torch.bfloat16)
    model.save_pretrained(FOLDER / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, FOLDER / "model")
    return count_parameters(model), flops_per_token(model, point.length)


def write_rows(point: Point) -> None:
    """Write the rows of all steps: words of the demo's essay, each at least one token, so that every row is cut."""
    words, draw = (DEMO_FOLDER / "essay.txt").read_text(encoding="utf-8").split(), random.Random(0)
    with (FOLDER / "rows.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(point.batch * (1 + TIMED_STEPS)):
            row = {"prompt": "", "completion": " ".join(draw.choices(words, k=point.length))}
            file.write(json.dumps(row) + "\n")


def carry_out(points: Iterable[Point], repeats: int) -> dict[Point, Result]:
    """Measure the points in turn, so that a slow hour of the machine slows all of them.

    Returns:
        Each point's run of median speed.
    """
    runs: dict[Point, list[Result]] = {point: [] for point in points}  # each once, however many axes share it
    for _ in range(repeats):
        for point, results in runs.items():
            # Spawned, since a fork would inherit this process's memory.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                results.append(process.submit(measure, point).result())
            print(f"{point}: {results[-1].speed:,.0f} tokens/s", flush=True)
    return {point: sorted(results, key=lambda result: result.speed)[repeats // 2] for point, results in runs.items()}


# ---------------------------------------------------------------------------------------------- reports


def line(axis: str, results: Sequence[Result]) -> list[float]:
    """Return the bytes that each peak would have on a straight line from the first result's peak to the last one's."""
    # Along the width memory grows with the parameters, since matrices grow with its square.
    causes = [result.parameters if axis == "width" else getattr(result.point, axis) for result in results]
    slope = (results[-1].measured - results[0].measured) / (causes[-1] - causes[0])
    return [results[0].measured + slope * (cause - causes[0]) for cause in causes]


def report(axis: str, results: Sequence[Result]) -> None:
    """Print an axis's table, and whether its speed is flat and its memory linear."""
    head = (axis, "parameters", "tokens/s", "GFLOP/s", "peak, GiB", "planned, GiB", "planned / measured")
    print(f"\n| {' | '.join(head)} |\n|{'---:|' * len(head)}")
    for result in results:
        print(
            f"| {getattr(result.point, axis):,} | {result.size} | {result.speed:,.0f} | {result.gflops:,.0f} "
            f"| {result.measured / GIB:.3f} | {result.planned / GIB:.3f} | {result.planned / result.measured:.4f} |"
        )
    speeds = [result.gflops for result in results]
    ratio = max(speeds) / min(speeds)
    off = max(abs(result.measured / there - 1) for result, there in zip(results, line(axis, results), strict=True))
    print(
        f"\nGFLOP/s {'stay flat' if ratio <= FLAT else 'are not flat'}: highest / lowest {ratio:.2f}. Memory "
        f"{'grows' if off <= STRAIGHT else 'does not grow'} linearly with {'parameters' if axis == 'width' else axis}: "
        f"at most {off:.1%} from a straight line through both ends."
    )


def plot(curves: dict[str, list[Result]], title: str, file: Path) -> None:
    """Draw a column for each axis: speed above, memory below, all columns to the same scales."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    size = (1.4 + 3.1 * len(curves), 6.2)
    figure, panels = pyplot.subplots(2, len(curves), figsize=size, squeeze=False, sharey="row", layout="constrained")
    rights = [panel.twinx() for panel in panels[0]]
    for right in rights[:-1]:
        right.sharey(rights[-1])
        right.tick_params(right=False, labelright=False)
    rights[-1].set_yscale("log")
    panels[1][0].set_yscale("log", base=2)
    for (axis, results), upper, right, lower in zip(curves.items(), panels[0], rights, panels[1], strict=True):
        values = [getattr(result.point, axis) for result in results]
        upper.set_title(TITLES[axis], fontsize=11)
        upper.plot(values, [result.gflops for result in results], "o-", color=BLUE, markersize=5)
        right.plot(values, [result.speed for result in results], "s:", color=ORANGE, markersize=4)
        straight = [there / GIB for there in line(axis, results)]
        lower.plot(values, straight, "--", color=GREY, linewidth=1.2, label="straight line through both ends")
        # Rings around dots show both where they agree.
        for name, colour, diameter, fill in (("planned", ORANGE, 10, "none"), ("measured", BLUE, 5, "full")):
            peaks = [getattr(result, name) / GIB for result in results]
            lower.plot(values, peaks, "o", color=colour, markersize=diameter, fillstyle=fill, label=name)
        sizes = [f"\n{result.size}" if axis in ("layers", "width") else "" for result in results]
        for panel in (upper, lower):
            panel.set_xscale("log", base=2)
            panel.set_xticks(values, [f"{value}{size}" for value, size in zip(values, sizes, strict=True)], fontsize=9)
            panel.grid(linewidth=0.5, alpha=0.5)
        for panel in (upper, right, lower):
            panel.minorticks_off()
            panel.spines[["top", "right"]].set_visible(False)
    # From 0, so that flat looks flat. Quantities that change many times over have logarithmic scales.
    panels[0][0].set_ylim(0, 1.1 * max(result.gflops for results in curves.values() for result in results))
    rights[-1].yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    rights[-1].yaxis.set_major_formatter("{x:,.0f}")
    panels[1][0].yaxis.set_major_formatter("{x:g}")
    panels[0][0].set_ylabel("GFLOP/s", color=BLUE)
    rights[-1].set_ylabel("tokens/s", color=ORANGE)
    panels[1][0].set_ylabel("peak memory of a step, GiB")
    panels[1][0].legend(frameon=False, fontsize=9, loc="upper left")
    figure.suptitle(title, fontsize=11, wrap=True)  # one axis alone makes a narrow picture
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Measure the points of the axes, print their tables, and draw the picture."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--axis", choices=AXES, help="one axis alone (default: all)")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each point, in turn (1)")
    parser.add_argument("--quick", action="store_true", help="three values of each axis, around the smallest of all")
    parser.add_argument("--output", type=Path, help="PNG to draw (docs/growth.png; none for one axis or a trial)")
    arguments = parser.parse_args()
    base, count = (Point(*(values[0] for values in AXES.values())), 3) if arguments.quick else (Point(), None)
    axes = [arguments.axis] if arguments.axis else [*AXES]
    # One axis must not replace the picture of all.
    file = arguments.output or (None if arguments.quick or arguments.axis else ROOT / "docs" / "growth.png")

    points = {axis: [replace(base, **{axis: value}) for value in AXES[axis][:count]] for axis in axes}
    # The largest model comes first: if it does not fit, that shows at once.
    results = carry_out([point for axis in reversed(axes) for point in reversed(points[axis])], arguments.repeats)
    curves = {axis: [results[point] for point in points[axis]] for axis in axes}
    title = f"A step of a Llama on {torch.get_num_threads()} CPU threads; base: {base}, {results[base].size} parameters"
    print(f"\n{title}; median of {TIMED_STEPS} steps; GiB = 2^30 bytes")
    for axis, found in curves.items():
        report(axis, found)
    if file is not None:
        plot(curves, title, file)


if __name__ == "__main__":
    main()
