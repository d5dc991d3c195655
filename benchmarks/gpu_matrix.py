"""Small runs of `train.py` under torch's sanitizer of CUDA streams, for `gpu.py`: every two options that may meet.

The sanitizer follows operators, events and streams, and raises where two kernels touch the same memory unordered. It
sees the threads of the loop and of backward, not those that carry chunks between tiers; `make emulated` sees these.
"""

import contextlib
import json
import os
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from emulated_cuda.cases import CHOICES, Case, covering_cases, name_of, options_of
from gpu_findings import Findings
from models import tiny_model
from small_runs import miniature, words_of
from transformers import AutoTokenizer

import train
from fullft.config.options import DEMO_FOLDER
from fullft.config.parse import parse_config

TABLE = "Runs of two steps, and how far their losses are from those with everything on the device, relatively"
WIDTH = 64  # of the models, so that matrices have moments in 8 bits
TOY_CASES = 2
# Losses of two placements differ by no more than this, relatively: kernels that add atomically do so in any order.
TOLERANCE = 1e-2
OPTIONS: dict[str, Any] = {
    "dataset": DEMO_FOLDER / "instructions.jsonl",
    "dataset_split": "train[:40]",
    "val_size": 0,
    "per_device_train_batch_size": 2,
    "max_length": 64,
    "max_steps": 2,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "eval_strategy": "no",
    "logging_steps": 1,
    "compile": "false",
    "fit": "off",
}


def run(findings: Findings) -> None:
    """Run the cases, each next to one with everything on the device."""
    if findings.is_emulated:
        findings.note("Without the sanitizer: the emulated device has no streams that it knows. Two cases only.")
    else:
        findings.require(finds_a_race(), "the sanitizer does not find a race that was made on purpose")
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(findings, Path(folder))
        cases = {name_of(case): case for case in cases_of(findings.is_emulated)}
        findings.carry_out({name: partial(runs.compare, name, case) for name, case in cases.items()})


def cases_of(is_emulated: bool) -> list[Case]:
    """Return the cases of the tests' matrix without resuming, which costs a second run."""
    cases = [{kind: name for kind, name in case.items() if kind != "start"} for case in covering_cases()]
    distinct = list({name_of(case): case for case in cases}.values())
    return distinct[:TOY_CASES] if is_emulated else distinct


class Runs:
    """Runs of `train.py` in this process.

    Args:
        findings: to add to.
        folder: for models and output.
    """

    def __init__(self, findings: Findings, folder: Path) -> None:
        self.findings, self.folder = findings, folder
        self._resident: dict[tuple[Any, ...], list[float]] = {}
        tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER / "model")
        for family in CHOICES["family"]:
            tiny_model(family, torch.float32, width=WIDTH).save_pretrained(folder / family)
            tokenizer.save_pretrained(folder / family)

    def compare(self, name: str, case: Case) -> None:
        """Run a case, and compare its losses with those of the run that has everything on the device.

        Raises:
            RuntimeError: it fails under the sanitizer, and not without it.
        """
        try:
            self._compare(name, case)
        except Exception as error:
            if (sanitizer := _sanitizer()) is None or not sanitizer.enabled:
                raise
            traceback.print_exc()
            with sanitizer_paused():
                self._compare(name, case)
            raise RuntimeError(f"fails under the sanitizer alone: {type(error).__name__}: {error}") from error

    def _compare(self, name: str, case: Case) -> None:
        options = options_of(case)
        losses = self._losses(options)
        resident = self._losses_of_resident(options)
        differences = [abs(one - other) / abs(other) for one, other in zip(losses, resident, strict=True)]
        worst = max(differences)
        row = {"first loss": losses[0], "last loss": losses[-1], "losses differ by": worst}
        self.findings.add(TABLE, {**case, **row})
        # A loss that is no number compares as false.
        self.findings.require(worst <= TOLERANCE, f"{name}: losses {losses}, and {resident} with all on the device")

    def _losses_of_resident(self, options: dict[str, Any]) -> list[float]:
        optim = options["optim"].removeprefix("paged_")
        resident = options | {"optim": optim, "offload": "none", "activation_checkpointing": "none"}
        key = tuple(resident.values())
        if key not in self._resident:
            with sanitizer_paused():  # one stream has no races, and this takes a fraction of the time
                self._resident[key] = self._losses(resident)
        return self._resident[key]

    def _losses(self, options: dict[str, Any]) -> list[float]:
        """Train, and return the losses of the evaluations and steps."""
        given = OPTIONS | options | {"model": self.folder / options["model"], "output_dir": self.folder / "run"}
        config = parse_config(words_of(given))
        try:
            with miniature(), planned_unwatched():
                train.main(config)
        finally:
            records = self._records()
        return [record["loss"] for record in records if "loss" in record]

    def _records(self) -> list[dict[str, Any]]:
        """Read the log, and remove the run."""
        log = self.folder / "run" / "log.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        return [json.loads(line) for line in lines]


# ---------------------------------------------------------------------------------------------- the sanitizer


@contextlib.contextmanager
def planned_unwatched() -> Iterator[None]:
    """Let runs plan without the sanitizer, which asks fake tensors for their memory's address."""
    plan_run = train.plan_run

    def unwatched(*arguments: Any) -> Any:
        with sanitizer_paused():
            return plan_run(*arguments)

    train.plan_run = unwatched
    try:
        yield
    finally:
        train.plan_run = plan_run


@contextlib.contextmanager
def sanitizer_paused() -> Iterator[None]:
    """Take the sanitizer away from this thread, where it is there."""
    sanitizer = _sanitizer()
    if sanitizer is None or not sanitizer.enabled:
        yield
        return
    sanitizer.disable()
    try:
        yield
    finally:
        sanitizer.enable()


def finds_a_race() -> bool:
    """Return whether the sanitizer raises where two streams write to the same memory unordered."""
    numbers = torch.zeros(1 << 20, device="cuda")
    try:
        with torch.Stream(device="cuda"):
            numbers.add_(1)
    except Exception as error:
        return "Sanitizer" in type(error).__name__
    finally:
        torch.cuda.synchronize()
    return False


def _sanitizer() -> Any:
    if "TORCH_CUDA_SANITIZER" not in os.environ:
        return None
    from torch.cuda import _sanitizer as module

    return module.cuda_sanitizer
