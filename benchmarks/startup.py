"""What is around the steps, each thing beside its own limit: start, data, weights in and out, the first step, the log.

    python benchmarks/startup.py --dataset alpaca.json                 # all of it, some ten minutes on two cores
    python benchmarks/startup.py --dataset alpaca.json --only loading

Owns one table, on the CPU, and the lines below it that say what the seconds of each row went to. A value and its limit
are measured one after the other in one process, a fresh one for every repeat, since libraries import and thread pools
start only once; the share is the median of their ratios. What is measured is the program's own: its functions are
called, or its `main` runs, and a clock watches the functions within. Linux only, for the page cache.
"""

# ruff: noqa: E402
import argparse
import atexit
import gc
import inspect
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple

from smollm2_model import WORK, build_smollm2

ROOT = Path(__file__).resolve().parents[1]
FOLDER = WORK / "startup"  # gone at the end
CACHE, ROWS, LLAMA, OUTPUT = FOLDER / "cache", FOLDER / "rows.jsonl", FOLDER / "llama", FOLDER / "run"
sys.path.insert(0, str(ROOT))  # the package need not be installed, as for train.py
os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "HF_DATASETS_CACHE": str(CACHE)}

from fullft.cpu.kernel_caches import limit_kernel_caches

limit_kernel_caches()  # as `train.py` does before it imports torch

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import train
from fullft.config.config import Config
from fullft.config.parse import parse_config
from fullft.data import batches as data
from fullft.data.formats import find_format
from fullft.data.sources import load_rows
from fullft.model import load as weights
from fullft.model.source import load_tokenizer
from fullft.saving import checkpoint, export
from fullft.storage.tiers import Storage

NUM_ROWS = 20_000  # to tokenise: as many as keep the tokenizer busy for seconds
TEXTS_PER_CALL = 1000  # that the tokenizer alone is given
PIECE = 1 << 24  # bytes read or written at a time
# The defaults of train.py, but for four rows a step, which suffice to time one, and for a log line at each.
RUN = "--max_steps 5 --gradient_accumulation_steps 4 --logging_steps 1"


class Row(NamedTuple):
    """A line of the table: the unit, what the value stands beside, and what of value and share is to be reached."""

    unit: str
    limit: str
    target: str = ""
    met: Callable[[float, float], bool] | None = None


LOADS = {"load fp32": "fp32", "load fp32, bf16 split": "bf16-true", "load bf16": "bf16-true"}  # row -> precision
_AT_LEAST = (">= 80%", lambda _, share: share >= 0.8)
TABLE = {
    "train.py --help": Row("s", "python -c pass", "<= 0.3 s", lambda value, _: value <= 0.3),
    "imports of train.py": Row("s", "those of the libraries"),
    **{f"tokenising, {what}": Row(f"{what}/s", "the tokenizer alone", *_AT_LEAST) for what in ("rows", "tokens")},
    "tokenised again": Row("rows", "all rows", "0 rows", lambda value, _: value == 0),
    **{f"{load}, cold": Row("MB/s", "reading from disk", *_AT_LEAST) for load in LOADS},
    **{f"{load}, warm": Row("MB/s", "reading from memory") for load in LOADS},  # converting is no reading
    **dict.fromkeys(("save_checkpoint", "export_model"), Row("MB/s", "writing + fsync", *_AT_LEAST)),
    "first step, beyond its own time": Row("s", "an ordinary step", "<= 5 s", lambda value, _: value <= 5),
    "log and memory, each step": Row("ms", "an ordinary step", "<= 1%", lambda _, share: share <= 0.01),
}


class Finding(NamedTuple):
    """One measurement of a row, and the seconds that its parts took."""

    row: str
    value: float
    limit: float
    parts: dict[str, float]


class Call(NamedTuple):
    """When a watched function began and ended, and the seconds of it that no watched function inside took."""

    name: str
    start: float
    end: float
    own: float


class Clock:
    """Notes each call of the functions that it watches, wherever the program makes it."""

    def __init__(self) -> None:
        """Watch nothing yet."""
        self.calls: list[Call] = []
        self._inside = [0.0]  # per call under way, seconds of the watched ones in it

    def watch(self, owner: Any, *names: str) -> "Clock":
        """Watch functions of a module or class; without names all functions of the program that the module knows."""
        known = [(name, function) for name, function in vars(owner).items() if inspect.isfunction(function)]
        for name in names or [name for name, function in known if function.__module__.startswith("fullft")]:
            label = f"{owner.__name__.removeprefix('fullft.')}.{name}"
            setattr(owner, name, self._watched(label, getattr(owner, name)))
        return self

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                end = time.perf_counter()
                self.calls.append(Call(name, start, end, end - start - self._inside.pop()))
                self._inside[-1] += end - start

        return watched

    def all(self, name: str) -> list[Call]:
        """Give the calls of one function, in the order of their ends."""
        return [call for call in self.calls if call.name == name]

    def parts(self, start: float, end: float) -> dict[str, float]:
        """Split a stretch of time among the functions that were at work in it."""
        seconds: Counter[str] = Counter()
        for call in self.calls:
            if start <= call.start and call.end <= end:
                seconds[call.name] += call.own
        return {**seconds, "the rest": end - start - seconds.total()}


def options(model: Path, dataset: str | Path, more: str = "") -> Config:
    """Give what train.py makes of a command line."""
    more += f" --output_dir {OUTPUT} --overwrite_output_dir"
    return parse_config(["--model", str(model), "--dataset", str(dataset), *more.split()])


# ---------------------------------------------------------------------------------------------- what is measured


def start(dataset: str) -> Iterator[Finding]:
    """Time whole commands. One whose model is missing ends where its work would begin, behind all of its imports."""
    for row, times, ours, limit in (
        ("train.py --help", 5, [str(ROOT / "train.py"), "--help"], ["-c", "pass"]),
        (
            "imports of train.py",
            1,
            [str(ROOT / "train.py"), "--model", "./missing"],
            # transformers imports most of itself when it is asked for a model.
            ["-c", "import torch, datasets; from transformers import PreTrainedModel"],
        ),
    ):
        seconds = [(_python(ours)[0], _python(limit)[0]) for _ in range(times)]
        parts: Counter[str] = Counter()
        for own, package in re.findall(r"(\d+) \| +\d+ \| +(\w+)", _python(["-X", "importtime", *ours])[1]):
            parts[f"import {package}"] += int(own) / 1e6
        yield Finding(row, *map(statistics.median, zip(*seconds, strict=True)), dict(parts))


def _python(arguments: list[str]) -> tuple[float, str]:
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode in (0, 4), done.stderr  # 4: the model is missing
    return time.perf_counter() - began, done.stderr


def tokenise(dataset: str, again: bool) -> Iterator[Finding]:
    """Prepare rows for the first time, beside the tokenizer alone on their texts; or again, as the next run would."""
    if not again:
        shutil.rmtree(CACHE, ignore_errors=True)
    config = options(build_smollm2(), ROWS)
    tokenizer = load_tokenizer(config, str(config.model))
    clock = Clock().watch(data).watch(data.Batches, "__init__").watch(type(tokenizer), "__call__")
    data.load_data(config, tokenizer)
    (whole,) = clock.all("data.load_data")
    seconds, parts = whole.end - whole.start, clock.parts(whole.start, whole.end)
    if again:
        yield Finding("tokenised again", len(clock.all("data._with_labels")), NUM_ROWS, parts)
        return
    rows, tokenizer = load_rows(config), load_tokenizer(config, str(config.model))  # one without a cache of words
    render = find_format(rows.column_names, dataset).render
    texts = [render(row, tokenizer).text for row in rows]
    began, num_tokens = time.perf_counter(), 0
    for first in range(0, len(texts), TEXTS_PER_CALL):
        num_tokens += sum(map(len, tokenizer(texts[first : first + TEXTS_PER_CALL]).input_ids))
    alone = time.perf_counter() - began
    yield Finding("tokenising, rows", len(rows) / seconds, len(rows) / alone, parts)
    yield Finding("tokenising, tokens", num_tokens / seconds, num_tokens / alone, {})


def load(dataset: str, row: str) -> Iterator[Finding]:
    """Load a model whose file is on disk alone, then one whose file is in the page cache."""
    folder = LLAMA if row == "load bf16" else build_smollm2()
    if not folder.is_dir():  # 1 GB in the dtype that most are published in: fixed costs weigh little
        shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "num_key_value_heads": 4}
        AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16).save_pretrained(folder)
    config, file = options(folder, dataset, f"--precision {LOADS[row]} --offload none"), folder / "model.safetensors"
    with torch.device("meta"):  # as the plan does before: the family's module is imported by then
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    clock, megabytes = Clock().watch(weights), file.stat().st_size / 1e6
    for state in ("cold", "warm"):
        _settle(file, state)
        began = time.perf_counter()
        model = weights.load_model(config, str(folder), Storage(torch.device("cpu"), FOLDER))
        for parameter in model.parameters():  # a mapped file is read, page by page, when somebody looks
            parameter.detach().view(-1)[::1024].sum()
        end = time.perf_counter()
        del model, parameter
        gc.collect()  # what is mapped cannot leave the page cache
        _settle(file, state)
        yield Finding(f"{row}, {state}", megabytes / (end - began), megabytes / _read(file), clock.parts(began, end))


def _settle(file: Path, state: str) -> None:
    """Put a file into the page cache, or take it out of it."""
    _read(file)
    with file.open("rb") as content:
        os.fsync(content.fileno())  # what is not on disk yet would stay
        if state == "cold":
            os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(file: Path) -> float:
    """Give the seconds that reading takes, always into the same memory: new memory costs more than a disk."""
    memory, began = bytearray(PIECE), time.perf_counter()
    with file.open("rb", buffering=0) as content:
        while content.readinto(memory):
            pass
    return time.perf_counter() - began


def run(dataset: str) -> Iterator[Finding]:
    """Run `train.main`: its first step, what each step is told and recorded, its checkpoint and its export."""
    clock = Clock().watch(train).watch(train.Metrics, "step", "require_finite").watch(train.Samples, "complete")
    clock.watch(checkpoint).watch(export).watch(weights)
    train.main(options(build_smollm2(), dataset, RUN))
    log = [json.loads(line) for line in (OUTPUT / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [each["num_tokens"] / each["tokens_per_second"] for each in log if "loss" in each]
    ordinary = statistics.median(steps[1:])
    for row, pattern in (("save_checkpoint", "checkpoint-*/*"), ("export_model", "model*.safetensors")):
        (whole,), num_bytes = clock.all(f"train.{row}"), sum(file.stat().st_size for file in OUTPUT.glob(pattern))
        speed = num_bytes / 1e6 / (whole.end - whole.start)
        yield Finding(row, speed, num_bytes / 1e6 / _write(num_bytes), clock.parts(whole.start, whole.end))
    loaded, told = clock.all("train.load_model")[0].end, clock.all("Metrics.step")
    parts = clock.parts(loaded, told[0].start)
    parts |= {"the step itself": steps[0], "the rest": parts["the rest"] - steps[0]}
    yield Finding("first step, beyond its own time", told[0].start - loaded - ordinary, ordinary, parts)
    names = ("Metrics.step", "Metrics.require_finite")
    costs = {name: statistics.mean(call.own for call in clock.all(name)[1:]) for name in names}
    yield Finding("log and memory, each step", 1e3 * sum(costs.values()), 1e3 * ordinary, costs)


def _write(num_bytes: int) -> float:
    """Give the seconds that writing a file takes until it is on disk; the bytes are random, lest a disk pack them."""
    piece, file = memoryview(os.urandom(PIECE)), FOLDER / "plain"
    began = time.perf_counter()
    with file.open("wb", buffering=0) as content:
        for first in range(0, num_bytes, PIECE):
            content.write(piece[: num_bytes - first])
        os.fsync(content.fileno())
    seconds = time.perf_counter() - began
    file.unlink()
    return seconds


# Name -> what it measures, in this order, each in a process of its own.
SECTIONS: dict[str, list[Callable[[str], Iterator[Finding]]]] = {
    "start": [start],
    "tokenising": [partial(tokenise, again=False), partial(tokenise, again=True)],
    "loading": [partial(load, row=row) for row in LOADS],
    "run": [run],
}


def main() -> None:
    """Measure in turn, print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0], allow_abbrev=False)
    parser.add_argument("--dataset", required=True, help="rows of any format, such as Alpaca's")
    parser.add_argument("--only", choices=SECTIONS, help="one part of the table")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement (default: 3)")
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    dataset = Path(arguments.dataset).resolve()
    if arguments.number is not None:  # in a process of its own
        print(json.dumps(list(SECTIONS[arguments.only][arguments.number](str(dataset)))))
        return
    atexit.register(shutil.rmtree, FOLDER)
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows = load_rows(options(build_smollm2(), dataset))
    rows.select([number % len(rows) for number in range(NUM_ROWS)]).to_json(ROWS)  # over and over, until they are many
    sections = [arguments.only] if arguments.only else list(SECTIONS)
    found: dict[str, list[Finding]] = {}
    measurements = [(name, number) for name in sections for number in range(len(SECTIONS[name]))]
    for name, number in measurements * arguments.repeats:
        more = ["--dataset", str(dataset), "--only", name, "--number", str(number)]
        done = subprocess.run([sys.executable, __file__, *more], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        for finding in json.loads(done.stdout.splitlines()[-1]):
            found.setdefault(finding[0], []).append(Finding(*finding))
    _print_table(found, arguments.repeats)


def _print_table(found: dict[str, list[Finding]], repeats: int) -> None:
    print(f"{torch.get_num_threads()} threads, medians of {repeats}; MB = 10^6 bytes\n")
    print(f"{'':32}{'value':>10}{'limit':>11} {'':8} {'':22}{'share':>8}  target")
    details = []
    for name, findings in found.items():
        row, shares = TABLE[name], [finding.value / finding.limit for finding in findings]
        value, limit, share = (statistics.median(each) for each in (*list(zip(*findings, strict=True))[1:3], shares))
        verdict = "" if row.met is None else "met" if row.met(value, share) else "MISSED"
        numbers = f"{_short(value):>10}{_short(limit):>11} {row.unit:8} {row.limit:22}{_short(100 * share):>7}%"
        print(f"{name:32}{numbers}  {row.target:9} {verdict}".rstrip())
        typical = min(findings, key=lambda finding: abs(finding.value / finding.limit - share)).parts
        whole, largest = sum(typical.values()), sorted(typical.items(), key=lambda item: -item[1])[:8]
        shown = ", ".join(f"{part} {_short(seconds)}" for part, seconds in largest if seconds > 0.01 * whole)
        details += [f"{name}, {_short(whole)} s: {shown}"] if shown else []
    print("\nWhere the seconds of a typical repeat went:", *details, sep="\n")


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 or number == int(number) else f"{number:.2g}"


if __name__ == "__main__":
    main()
