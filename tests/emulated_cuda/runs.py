"""Whole runs of train.py in this process, on the emulated device or on the CPU, and what is seen of them."""

import gc
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model
from small_runs import miniature, words_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerBase

import train
from emulated_cuda import library
from emulated_cuda.library import Wait, figure
from emulated_cuda.watch import managed_bytes
from fullft.config.options import DEMO_FOLDER
from fullft.config.parse import parse_config
from fullft.data.batches import Batches
from fullft.memory.profile import Profile
from fullft.run.log import Log

WIDTH = 64  # so that matrices have moments in 8 bits
WORKERS = "offload"  # begins the names of threads that may wait for the device

OPTIONS: dict[str, Any] = {
    "dataset": DEMO_FOLDER / "instructions.jsonl",
    "dataset_split": "train[:40]",
    "val_size": 0.05,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_length": 64,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "eval_strategy": "no",
    "logging_steps": 1,
    "compile": "false",
    "fit": "off",
}


@dataclass
class Memory:
    """Of the worst step, in bytes.

    Attributes:
        planned: the peak that was planned.
        tracked: the peak that the tracker has found.
        requested: the peak of what tensors asked for, with managed memory.
        allocated: the peak of the blocks that they got.
        host: what was planned for the host, and what the tracker has found there.
        pinned: torch's pinned blocks, and what was registered besides.
    """

    planned: int
    tracked: int
    requested: int
    allocated: int
    host: tuple[int, int]
    pinned: int


@dataclass
class Outcome:
    """What is seen of a run.

    Attributes:
        losses: of each step, and of the evaluations before and after.
        norms: of the gradients of each step.
        weights: a digest of the exported file.
        races: that were found.
        waits: of the threads that run the loop and backward, within each step.
        memory: None on a CPU.
    """

    losses: list[float]
    norms: list[float]
    weights: str
    races: list[str]
    waits: "list[list[Wait]]"
    memory: Memory | None

    @property
    def trajectory(self) -> tuple[object, ...]:
        """All that must be equal, bit by bit, wherever things live."""
        return self.losses, self.norms, self.weights


def save_models(folder: Path, families: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Save a tiny model of each family, with the demo's tokenizer, under its name."""
    for family in families:
        tiny_model(family, torch.float32, width=WIDTH).save_pretrained(folder / family)
        tokenizer.save_pretrained(folder / family)


@contextmanager
def without_device() -> Iterator[None]:
    """Hide the device from what asks for one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
        yield


def train_resumed(options: dict[str, Any]) -> Outcome:
    """Train, drop what was saved at the end, and train on from the checkpoint before; races of both runs are returned.

    Args:
        options: on top of `OPTIONS`.
    """
    saving = options | {"save_strategy": "steps", "save_steps": 2}
    races = train_here(saving).races
    output = Path(options["output_dir"])
    shutil.rmtree(output / f"checkpoint-{OPTIONS['max_steps']}", ignore_errors=True)
    (output / "model.safetensors").unlink()
    outcome = train_here(saving | {"resume_from_checkpoint": "newest"})
    return replace(outcome, races=races + outcome.races)


def train_here(options: dict[str, Any]) -> Outcome:
    """Train as train.py does, and watch.

    Args:
        options: on top of `OPTIONS`.
    """
    gc.collect()
    library.call("empty_host_cache")
    library.reset()
    watched = _Watched()
    with miniature(), watched:
        train.main(parse_config(words_of(OPTIONS | options)))
    folder = Path(options["output_dir"])
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    losses = [record.get("loss", record.get("eval_loss")) for record in records]
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    norms = [record["grad_norm"] for record in steps]
    return Outcome(losses, norms, digest, list(library.races), watched.waits, watched.memory(folder))


def _with_plain_attention(plan: Callable[..., Any]) -> Callable[..., Any]:
    """Plan the attention that the emulated device has, rather than a card's fused one."""

    def planned(*arguments: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return plan(*arguments)

    return planned


@dataclass
class _Watched:
    """Watches a run: waits within its steps, and memory while its worst step is measured."""

    waits: "list[list[Wait]]" = field(default_factory=list)
    _figures: dict[str, int] = field(default_factory=dict)

    def __enter__(self) -> "_Watched":
        self._before = {name: figure(name) for name in ("requested", "allocated", "pinned_held", "registered")}
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(train, "plan_run", _with_plain_attention(train.plan_run))
        self._patch.setattr(train, "measure_run", self._measuring(train.measure_run))
        self._patch.setattr(Batches, "global_batch", self._beginning(Batches.global_batch))
        self._patch.setattr(Log, "step", self._ending(Log.step))
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def _measuring(self, measure: Callable[..., Profile]) -> Callable[..., Profile]:
        def measured(*arguments: Any, **named: Any) -> Profile:
            library.call("reset_peaks")
            profile = measure(*arguments, **named)
            self._figures = {name: figure(f"{name}_peak") - before for name, before in self._before.items()}
            self._figures["requested"] += managed_bytes()
            return profile

        return measured

    def _beginning(self, fetch: Callable[..., Any]) -> Callable[..., Any]:
        def fetched(*arguments: Any) -> Any:
            library.waits.clear()
            return fetch(*arguments)

        return fetched

    def _ending(self, log: Callable[..., None]) -> Callable[..., None]:
        def logged(*arguments: Any) -> None:
            log(*arguments)
            # Backward has a thread of its own, for which the loop waits.
            self.waits.append([wait for wait in library.waits.elements() if not wait.thread.startswith(WORKERS)])

        return logged

    def memory(self, folder: Path) -> Memory | None:
        """Read what was planned and tracked, next to what the allocator had."""
        record = json.loads((folder / "memory.json").read_text())
        planned, tracked = record["planned"], record["measured"]
        if "allocated_peak_bytes" not in record["process"]:
            return None
        return Memory(
            planned["peak_bytes"],
            tracked["peak_bytes"],
            self._figures["requested"],
            self._figures["allocated"],
            (planned["host_bytes"], tracked["host_bytes"]),
            self._figures["pinned_held"] + self._figures["registered"],
        )
