"""Whole runs in miniature, in this process: the demo with a smaller model, and without pictures."""

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from matplotlib.figure import Figure
from transformers import PreTrainedConfig

import fullft.memory.choose
import fullft.model.load
import fullft.model.source
import fullft.run.evaluation
import train
from fullft.config.config import Config
from fullft.config.options import DEMO_FOLDER
from fullft.config.parse import parse_config
from fullft.memory.plan import Batch, plan_step, planned_device_type
from fullft.saving.output_dir import list_checkpoints

SMALL = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "val_size": 0,
    "max_steps": 2,
    "max_length": 64,
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_steps": 1,
    "output_dir": "out",
}
OUT = Path("out")
EXPLODES = {"learning_rate": 1e30, "warmup_steps": 0, "max_steps": 3}  # the loss of step 2 is not a number


@cache
def _smaller_demo() -> Path:
    """Make a folder like the demo's model, dropout included, just large enough for moments in 8 bits."""
    folder = Path(mkdtemp(prefix="fullft-demo-"))
    for file in (DEMO_FOLDER / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 2, "n_embd": 64, "n_head": 2}))
    return folder


_PLANNED: dict[tuple[object, ...], dict[str, Any]] = {}


def _plan_step_once(config: Config, model_config: PreTrainedConfig, batch: Batch) -> dict[str, Any]:
    """Predict as `plan_step` does, but trace equal steps once; tracing is most of a small run's time."""
    formats = (planned_device_type(config), config.numerics, config.recomputation, config.placement)
    key = (
        *formats,
        config.joins_rows,
        config.accumulates,
        config.max_grad_norm,
        model_config.to_json_string(use_diff=False),
        batch,
    )
    if key not in _PLANNED:
        _PLANNED[key] = plan_step(config, model_config, batch)
    return copy.deepcopy(_PLANNED[key])


@contextmanager
def miniature() -> Iterator[None]:
    """Make runs of the demo in the body take a smaller model, leave pictures empty, and generate short samples.

    What they plan is traced once per process.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module in (fullft.model.source, fullft.model.load):
            patch.setattr(module, "DEMO_MODEL", _smaller_demo())
        patch.setattr(Figure, "savefig", lambda _, file, **__: Path(file).touch())
        patch.setattr(fullft.memory.choose, "plan_step", _plan_step_once)
        patch.setattr(fullft.run.evaluation, "_MAX_NEW_TOKENS", 2)
        yield


def words_of(options: dict[str, Any]) -> list[str]:
    """Write options as a command line."""
    return [f"--{name}={value}" for name, value in options.items()]


def train_small(words: Sequence[str] = (), **options: Any) -> None:
    """Train the miniature of the demo for two steps; options, and words even more, beat what that sets."""
    with miniature():
        train.main(parse_config([*words_of(SMALL | options), *words]))


def contents(folder: Path) -> dict[str, bytes]:
    """Read every file below a folder, by its path there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps_saved() -> list[int]:
    """Return the steps of the checkpoints in the output folder, the newest first."""
    return [int(folder.name.split("-")[1]) for folder in list_checkpoints(OUT)]
