"""Measure what surrounds the steps, each part next to its limit: start, data, weights, first step, log.

    python benchmarks/startup.py --dataset alpaca.json                 # all of it, some ten minutes on two cores
    python benchmarks/startup.py --dataset alpaca.json --only loading

It prints one table, for the CPU, and below it the functions that took the seconds of each row. A value and its limit
are measured one after the other in one process, and the share is the median of their ratios. Every repeat has a fresh
process, since libraries import and thread pools start only once. The program's own functions are called, or its `main`
runs, and a clock watches the functions within. Linux only, for the page cache.
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
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple

from smollm2_model import WORK, build_smollm2

ROOT = Path(__file__).resolve().parents[1]
FOLDER = WORK / "startup"  # removed at the end
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
from fullft.data import load as data_load
from fullft.data import tokenise as data_tokenise
from fullft.data.batches import Batches
from fullft.data.formats import Reader, find_format
from fullft.data.sources import load_rows
from fullft.data.template import ChatTemplate
from fullft.model import load as model_load
from fullft.model.source import load_tokenizer
from fullft.run.evaluation import Samples
from fullft.run.log import Log
from fullft.saving import checkpoint, export, weights
from fullft.storage.tiers import Storage

NUM_ROWS = 20_000  # to tokenise: enough to keep the tokenizer busy for seconds
TEXTS_PER_CALL = 1000  # of the tokenizer alone
PIECE = 1 << 24  # bytes read or written at a time
# The defaults of train.py, except for four rows a step, which are enough to time one, and a log line at each step.
RUN = "--max_steps 5 --per_device_train_batch_size 1 --gradient_accumulation_steps 4 --logging_steps 1"


class Row(NamedTuple):
    """A line of the table.

    Attributes:
        unit: of the value and its limit.
        limit: what the value is compared with.
        target: what is to be reached, as text.
        met: whether a value and its share of the limit reach it.
    """

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
    **{
        f"{load}, warm": Row("MB/s", "reading from memory") for load in LOADS
    },  # there is no target, since converting is more than reading
    **dict.fromkeys(("save_checkpoint", "export_model"), Row("MB/s", "writing + fsync", *_AT_LEAST)),
    "first step, beyond its own time": Row("s", "an ordinary step", "<= 5 s", lambda value, _: value <= 5),
    "log and memory, each step": Row("ms", "an ordinary step", "<= 1%", lambda _, share: share <= 0.01),
}


class Finding(NamedTuple):
    """One measurement of a row.

    Attributes:
        row: a key of `TABLE`.
        value: as measured.
        limit: measured in the same process.
        parts: seconds, by function.
    """

    row: str
    value: float
    limit: float
    parts: dict[str, float]


class Call(NamedTuple):
    """One call of a watched function.

    Attributes:
        name: of the function.
        start: on the clock, in seconds.
        end: on the clock, in seconds.
        own: seconds outside of other watched functions.
    """

    name: str
    start: float
    end: float
    own: float


class Clock:
    """Records each call of the functions that it watches, wherever the program makes it."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._inside = [0.0]  # per running call, seconds of the watched calls in it

    def watch(self, owner: Any, *names: str) -> "Clock":
        """Watch functions of a module or class; without names, all of the program's functions in the module."""
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
        """Return the calls of one function, in the order in which they ended."""
        return [call for call in self.calls if call.name == name]

    def parts(self, start: float, end: float) -> dict[str, float]:
        """Split an interval of time among the functions that ran in it."""
        seconds: dict[str, float] = defaultdict(float)
        for call in self.calls:
            if start <= call.start and call.end <= end:
                seconds[call.name] += call.own
        return {**seconds, "the rest": end - start - sum(seconds.values())}


def options(model: Path, dataset: str | Path, more: str = "") -> Config:
    """Return the options as train.py reads them from a command line."""
    more += f" --output_dir {OUTPUT} --overwrite_output_dir"
    return parse_config(["--model", str(model), "--dataset", str(dataset), *more.split()])


# ---------------------------------------------------------------------------------------------- what is measured


def start(dataset: str) -> Iterator[Finding]:
    """Time whole commands. A run with a missing model ends after all imports, where its work would begin."""
    for row, times, ours, limit in (
        ("train.py --help", 5, [str(ROOT / "train.py"), "--help"], ["-c", "pass"]),
        (
            "imports of train.py",
            1,
            [str(ROOT / "train.py"), "--model", "./missing"],
            # transformers imports most of itself when a model class is requested.
            ["-c", "import torch, datasets; from transformers import PreTrainedModel"],
        ),
    ):
        seconds = [(_python(ours)[0], _python(limit)[0]) for _ in range(times)]
        parts: dict[str, float] = defaultdict(float)
        for own, package in re.findall(r"(\d+) \| +\d+ \| +(\w+)", _python(["-X", "importtime", *ours])[1]):
            parts[f"import {package}"] += int(own) / 1e6
        value, least = map(statistics.median, zip(*seconds, strict=True))
        yield Finding(row, value, least, dict(parts))


def _python(arguments: list[str]) -> tuple[float, str]:
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode in (0, 4), done.stderr  # 4: the model is missing
    return time.perf_counter() - began, done.stderr


def tokenise(dataset: str, again: bool) -> Iterator[Finding]:
    """Prepare rows for the first time, next to the tokenizer alone on their texts; or again, as the next run would."""
    if not again:
        shutil.rmtree(CACHE, ignore_errors=True)
    config = options(build_smollm2(), ROWS)
    tokenizer = load_tokenizer(config, str(config.model))
    clock = Clock().watch(data_load).watch(data_tokenise).watch(Batches, "__init__")
    clock.watch(type(tokenizer), "__call__")
    data_load.load_data(config, tokenizer)
    (whole,) = clock.all("data.load.load_data")
    seconds, parts = whole.end - whole.start, clock.parts(whole.start, whole.end)
    if again:
        yield Finding("tokenised again", len(clock.all("data.tokenise._with_labels")), NUM_ROWS, parts)
        return
    rows, tokenizer = (
        load_rows(config),
        load_tokenizer(config, str(config.model)),
    )  # a tokenizer with an empty cache of words
    render, reader = find_format(rows.column_names, dataset).render, Reader(ChatTemplate(tokenizer))
    texts = [rendered.text for row in rows.to_list() for rendered in render(row, reader)]
    began, num_tokens = time.perf_counter(), 0
    for first in range(0, len(texts), TEXTS_PER_CALL):
        num_tokens += sum(map(len, tokenizer(texts[first : first + TEXTS_PER_CALL]).input_ids))
    alone = time.perf_counter() - began
    yield Finding("tokenising, rows", len(rows) / seconds, len(rows) / alone, parts)
    yield Finding("tokenising, tokens", num_tokens / seconds, num_tokens / alone, {})


def load(dataset: str, row: str) -> Iterator[Finding]:
    """Load a model whose file is only on disk, then the same model with its file in the page cache."""
    folder = LLAMA if row == "load bf16" else build_smollm2()
    if not folder.is_dir():  # 1 GB in the usual dtype, so that fixed costs matter little
        shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "num_key_value_heads": 4}
        AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16).save_pretrained(folder)
    config, file = options(folder, dataset, f"--precision {LOADS[row]} --offload none"), folder / "model.safetensors"
    with torch.device("meta"):  # the plan does this before, so that the family's module is imported
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    clock, megabytes = Clock().watch(model_load), file.stat().st_size / 1e6
    for state in ("cold", "warm"):
        _settle(file, state)
        began = time.perf_counter()
        model = model_load.load_model(config, str(folder), Storage(torch.device("cpu"), FOLDER))
        for parameter in model.parameters():  # pages of a mapped file are read when they are used
            parameter.detach().view(-1)[::1024].sum()
        end = time.perf_counter()
        del model, parameter
        gc.collect()  # a mapped file cannot leave the page cache
        _settle(file, state)
        yield Finding(f"{row}, {state}", megabytes / (end - began), megabytes / _read(file), clock.parts(began, end))


def _settle(file: Path, state: str) -> None:
    """Put a file into the page cache, or remove it from there."""
    _read(file)
    with file.open("rb") as content:
        os.fsync(content.fileno())  # pages that are not yet on disk would stay
        if state == "cold":
            os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(file: Path) -> float:
    """Return the seconds of reading a file, always into the same memory, since new memory costs more than a disk."""
    memory, began = bytearray(PIECE), time.perf_counter()
    with file.open("rb", buffering=0) as content:
        while content.readinto(memory):
            pass
    return time.perf_counter() - began


def run(dataset: str) -> Iterator[Finding]:
    """Run `train.main`, and time its first step, the log of each step, its checkpoint and its export."""
    clock = Clock().watch(train).watch(Log, "step", "require_finite").watch(Samples, "complete")
    clock.watch(checkpoint).watch(export).watch(weights).watch(model_load)
    train.main(options(build_smollm2(), dataset, RUN))
    log = [json.loads(line) for line in (OUTPUT / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [each["num_tokens"] / each["tokens_per_second"] for each in log if "loss" in each]
    ordinary = statistics.median(steps[1:])
    for row, pattern in (("save_checkpoint", "checkpoint-*/*"), ("export_model", "model*.safetensors")):
        (whole,), num_bytes = clock.all(f"train.{row}"), sum(file.stat().st_size for file in OUTPUT.glob(pattern))
        speed = num_bytes / 1e6 / (whole.end - whole.start)
        yield Finding(row, speed, num_bytes / 1e6 / _write(num_bytes), clock.parts(whole.start, whole.end))
    loaded, logged = clock.all("train.load_model")[0].end, clock.all("Log.step")
    parts = clock.parts(loaded, logged[0].start)
    parts |= {"the step itself": steps[0], "the rest": parts["the rest"] - steps[0]}
    yield Finding("first step, beyond its own time", logged[0].start - loaded - ordinary, ordinary, parts)
    names = ("Log.step", "Log.require_finite")
    costs = {name: statistics.mean(call.own for call in clock.all(name)[1:]) for name in names}
    yield Finding("log and memory, each step", 1e3 * sum(costs.values()), 1e3 * ordinary, costs)


def _write(num_bytes: int) -> float:
    """Return the seconds until a written file is on disk. Its bytes are random, so that no disk can compress them."""
    piece, file = memoryview(os.urandom(PIECE)), FOLDER / "plain"
    began = time.perf_counter()
    with file.open("wb", buffering=0) as content:
        for first in range(0, num_bytes, PIECE):
            content.write(piece[: num_bytes - first])
        os.fsync(content.fileno())
    seconds = time.perf_counter() - began
    file.unlink()
    return seconds


# Name -> measurements, in this order, each in a process of its own.
SECTIONS: dict[str, list[Callable[[str], Iterator[Finding]]]] = {
    "start": [start],
    "tokenising": [partial(tokenise, again=False), partial(tokenise, again=True)],
    "loading": [partial(load, row=row) for row in LOADS],
    "run": [run],
}


def main() -> None:
    """Measure in turn, and print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0], allow_abbrev=False)
    parser.add_argument("--dataset", required=True, help="rows of any format, such as Alpaca's")
    parser.add_argument("--only", choices=SECTIONS, help="one part of the table")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of each measurement (default: 3)")
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    dataset = Path(arguments.dataset).resolve()
    if arguments.number is not None:  # in a process of its own
        print(json.dumps(list(SECTIONS[arguments.only][arguments.number](str(dataset)))))
        return
    atexit.register(shutil.rmtree, FOLDER)
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows = load_rows(options(build_smollm2(), dataset)).to_list()
    lines = (json.dumps(rows[number % len(rows)]) for number in range(NUM_ROWS))  # repeated until there are many
    Path(ROWS).write_text("\n".join(lines), encoding="utf-8")
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
