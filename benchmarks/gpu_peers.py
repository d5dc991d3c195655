"""Tokens per second of ours, Trainer and TRL on the card, for `gpu.py`: the systems of `contenders.py`.

The rows are made here, of words of the demo's, as long as rows of real data sets are.
"""

import json
import math
import random
import statistics
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from contenders import OURS, PEERS, ROWS_PER_STEP, TRLS, Task, has_trl, slug, train_ours, train_peer
from gpu_findings import GIB, Findings
from gpu_steps import WORK, small_config
from smollm2_model import build_smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from fullft.config.options import DEMO_FOLDER

# In this order, since there may be no time for all.
SYSTEMS = (
    "Trainer, grouped by length, 8 rows at a time",
    "ours, bf16-mixed, packing, compiled, steps of one micro-batch",
    "TRL SFTTrainer, packing",
    "ours, bf16-true, packing, compiled, steps of one micro-batch",
    "ours, bf16-mixed, packing",
    "Trainer, dynamic padding",
    "ours, bf16-mixed",
    "ours, bf16-true, packing",
)
TOY_SYSTEMS = ("Trainer, grouped by length, 8 rows at a time", "ours, bf16-mixed, packing")
STEPS = 7
WARM_UP = 2  # steps that do not count: kernels are loaded, layers are compiled
MEDIAN_WORDS, SPREAD = 150, 0.7  # of a row: a log-normal distribution, as instructions have
MOST_WORDS = 600
TABLE = f"Real tokens per second, steps of {ROWS_PER_STEP} rows"


def run(findings: Findings, system: str = "", task: dict[str, Any] | None = None) -> None:
    """Train with the systems, each in a process of its own.

    Args:
        findings: to add to.
        system: the one to train with in this process; else all are started.
        task: its `Task`, as JSON.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if task is not None:
        given = Task(**task | {"source": Path(task["source"]), "folder": Path(task["folder"])})
        result = train_ours(given, system) if system in OURS else train_peer(given, system)
        (given.folder / f"{slug(system)}.json").write_text(json.dumps(result), encoding="utf-8")
        return
    prepared = prepare(findings)
    names = [name for name in (TOY_SYSTEMS if findings.is_emulated else SYSTEMS) if name not in TRLS or has_trl()]
    if not has_trl():
        findings.left_out += list(TRLS)
        findings.note("TRL is not installed.")
    findings.note(
        f"{prepared.rows} rows of {prepared.mean_length} tokens on average, packed to at most 1,024; medians of "
        f"{STEPS - WARM_UP} steps. Padding is no token. Memory is the peak of torch's allocator."
    )
    findings.carry_out({name: partial(measure, findings, prepared, name) for name in names})


def prepare(findings: Findings) -> Task:
    """Write the rows, and count their tokens.

    Args:
        findings: says which model it is.
    """
    folder = WORK / "peers"
    folder.mkdir(parents=True, exist_ok=True)
    source = model_folder(findings)
    count = STEPS * ROWS_PER_STEP
    (folder / "rows.jsonl").write_text("".join(rows(count, 10 if findings.is_emulated else 1)), encoding="utf-8")
    draft = Task(source, folder, count, 0, 0, 0.0)
    lengths, targets = [], 0
    batches = draft.batches("ours, bf16-mixed")
    for step in range(1, STEPS + 1):
        batch = batches.global_batch(step)
        lengths += [micro_batch.num_tokens for micro_batch in batch]
        targets += batch.num_target_tokens
    return Task(source, folder, count, sum(lengths), targets, sum(each**2 for each in lengths) / sum(lengths))


def model_folder(findings: Findings) -> Path:
    """Return a folder with SmolLM2-135M from its package, else with a Llama of its shape and random weights.

    Args:
        findings: is told which one.
    """
    if not findings.is_emulated:
        try:
            folder = build_smollm2()
            findings.note("The model is SmolLM2-135M.")
            return folder
        except (Exception, SystemExit) as error:
            findings.note(f"The model has SmolLM2-135M's shape and random weights, since: {error}.")
    folder = WORK / ("toy" if findings.is_emulated else "llama")
    AutoModelForCausalLM.from_config(small_config(findings.is_emulated)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_FOLDER / "model").save_pretrained(folder)
    return folder


def rows(count: int, divisor: int) -> list[str]:
    """Make rows of instructions and answers, as lines of JSON.

    Args:
        count: of rows.
        divisor: of their lengths, for toys.
    """
    chance = random.Random(0)
    words = (DEMO_FOLDER / "essay.txt").read_text(encoding="utf-8").split()
    lines = []
    for _ in range(count):
        length = min(MOST_WORDS, round(chance.lognormvariate(math.log(MEDIAN_WORDS), SPREAD))) // divisor + 8
        chosen = chance.choices(words, k=length)
        row = {"instruction": " ".join(chosen[: length // 3]), "input": "", "output": " ".join(chosen[length // 3 :])}
        lines.append(json.dumps(row) + "\n")
    return lines


def measure(findings: Findings, task: Task, name: str) -> None:
    """Train with one system in a process of its own.

    Args:
        findings: to add to.
        task: the model and the rows.
        name: one of `OURS` or `PEERS`.
    """
    assert name in OURS or name in PEERS
    file = task.folder / f"{slug(name)}.json"
    file.unlink(missing_ok=True)
    given = json.dumps({"system": name, "task": asdict(task)}, default=str)
    words = ["--part", "peers", "--seconds", "0", "--work", str(task.folder), "--arguments", given]
    words += ["--emulated"] if findings.is_emulated else []
    (task.folder / "parts").mkdir(exist_ok=True)
    command = [sys.executable, str(Path(__file__).parent / "gpu.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, findings.seconds_left))
    print(done.stdout[-1000:], done.stderr[-3000:])
    if done.returncode:
        raise RuntimeError(f"ended with {done.returncode}: {done.stderr[-250:]}")
    result = json.loads(file.read_text(encoding="utf-8"))
    steps = [sum(lap.values()) for lap in result["laps"]]
    speeds = [tokens / seconds for tokens, seconds in zip(result["tokens"], steps, strict=True)]
    findings.add(
        TABLE,
        {
            "system": name,
            "tokens/s": statistics.median(speeds[WARM_UP:]),
            "first step, s": steps[0],
            "padding": 1 - sum(result["tokens"]) / sum(result["positions"]),
            "peak, GiB": result["peak_bytes"] / GIB,
            "first loss": result["losses"][0],
            "last loss": result["losses"][-1],
        },
    )
