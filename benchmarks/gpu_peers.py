"""Tokens per second of ours, Trainer and TRL on the card, for `gpu.py`: the systems of `contenders.py`."""

import json
import statistics
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from contenders import PEERS, TRLS, has_trl, train_ours, train_peer
from gpu_findings import GIB, Findings
from gpu_rows import STEPS, prepare
from task import OURS, ROWS_PER_STEP, Task, slug
from transformers.utils import logging

# In this order, since there may be no time for all.
SYSTEMS = (
    "Trainer, grouped by length, 8 rows at a time",
    "ours, the default command",
    "ours, the default command, compiled",
    "TRL SFTTrainer, padding-free",
    "ours, bf16-true, packing, compiled, steps of one micro-batch",
    "TRL SFTTrainer, packing",
    "ours, the default command, bf16-mixed",
    "Trainer, dynamic padding",
    "ours, bf16-mixed, packing",
)
TOY_SYSTEMS = ("Trainer, grouped by length, 8 rows at a time", "ours, bf16-mixed, packing")
WARM_UP = 2  # steps that do not count: kernels are loaded, layers are compiled
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
        findings.left_out += [name for name in SYSTEMS if name in TRLS]
        findings.note("TRL is not installed.")
    findings.note(
        f"{prepared.rows} rows of {prepared.mean_length} tokens on average, of at most 1,024; medians of "
        f"{STEPS - WARM_UP} steps. Padding is no token. Memory is the peak of torch's allocator."
    )
    findings.carry_out({name: partial(measure, findings, prepared, name) for name in names})


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
