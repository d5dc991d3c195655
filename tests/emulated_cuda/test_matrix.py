"""Runs on the emulated device, over choices of precision, placement, optimizer and the rest, in pairs.

No race and no mix of devices; the same bits wherever things live; losses as on the CPU; memory as planned; few waits.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from emulated_cuda.cases import CHOICES, covering_cases, name_of, options_of
from emulated_cuda.library import Wait
from emulated_cuda.runs import Memory, Outcome, save_models, train_here, train_resumed, without_device
from fullft.optim import adamw, gradients
from fullft.storage import tiers

pytestmark = pytest.mark.emulated

# How often the loop may wait for the device: for the loss and the norm; never for a micro-batch.
WAITS_PER_STEP = 2
WAITS_PER_MICRO_BATCH = 0

# Largest relative differences of losses and norms from those on the CPU, which computes attention and sums otherwise.
LOSS_AS_ON_CPU = {"fp32": 1e-5, "mixed": 1e-3, "split": 1e-3, "plain": 1e-3, "stochastic": 1e-3}
NORM_AS_ON_CPU = {"fp32": 1e-4, "mixed": 1e-2, "split": 1e-2, "plain": 1e-2, "stochastic": 1e-2}
EIGHT_BITS_AMPLIFY = 50  # a moment next to a boundary gets another code: bitsandbytes' kernel is not ours

# The plan is what was tracked, to the byte, without what it does not know of batches: rows that are locked on their way
# to the device, and where documents begin there.
BATCHES = 1 << 14
# It keeps gradients that leave the device in backward as long as their last chunks may be on their way, and in a run
# most of them arrive sooner.
PLANNED_ON_THEIR_WAY = 1 << 18
# Tensors ask for it, and blocks of 512 bytes are handed out; the models are tiny.
ALLOCATED_WITHIN = 0.02
# Pinned besides, for a disk alone: torch keeps buffers of one size while those of another are in use.
PINNED_BESIDES = 3 << 20

EIGHT_BIT_CHUNK = 1 << 18  # whose scales are whole pages


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    folder = tmp_path_factory.mktemp("emulated")
    save_models(folder, list(CHOICES["family"]), tokenizer)
    return folder


@pytest.fixture(scope="session")
def resident() -> dict[tuple[Any, ...], tuple[Outcome, Outcome]]:
    """Runs with everything on the device, by their options, next to those on the CPU."""
    return {}


def resident_runs(
    options: dict[str, Any], known: dict[tuple[Any, ...], tuple[Outcome, Outcome]]
) -> tuple[Outcome, Outcome]:
    optim = options["optim"].removeprefix("paged_")
    options = options | {"optim": optim, "offload": "none", "activation_checkpointing": "none"}
    key = tuple(value for name, value in options.items() if name != "output_dir")
    if key not in known:
        on_device = train_here(options)
        with without_device():
            known[key] = (on_device, train_here(options | {"output_dir": f"{options['output_dir']}-cpu"}))
    return known[key]


@pytest.mark.parametrize("case", covering_cases(), ids=name_of)
def test_run_is_ordered_exact_and_planned(
    case: dict[str, str],
    models: Path,
    tmp_path: Path,
    small_chunks: int,
    monkeypatch: pytest.MonkeyPatch,
    resident: dict[tuple[Any, ...], tuple[Outcome, Outcome]],
) -> None:
    has_8_bits = "8bit" in case["optimizer"]
    if has_8_bits:
        for module in (adamw, gradients, tiers):
            monkeypatch.setattr(module, "CHUNK", EIGHT_BIT_CHUNK)
    options = options_of(case)
    options |= {"model": models / options["model"], "output_dir": tmp_path / "run"}
    run = (train_resumed if case["start"] == "resumed" else train_here)(options)
    on_device, on_cpu = resident_runs(options | {"output_dir": tmp_path / "resident"}, resident)
    assert run.races == [] == on_device.races
    assert run.trajectory == on_device.trajectory
    wider = EIGHT_BITS_AMPLIFY if has_8_bits else 1
    assert run.losses == pytest.approx(on_cpu.losses, rel=wider * LOSS_AS_ON_CPU[case["precision"]])
    assert run.norms == pytest.approx(on_cpu.norms, rel=wider * NORM_AS_ON_CPU[case["precision"]])
    assert run.losses[-1] < run.losses[0]
    assert run.memory is not None and on_cpu.memory is None
    check_memory(run.memory, options["offload"])
    check_waits(run.waits, options["gradient_accumulation_steps"])


def check_memory(memory: Memory, offload: str) -> None:
    assert memory.tracked == memory.requested
    on_their_way = PLANNED_ON_THEIR_WAY if "gradients=host" in offload or "gradients=disk" in offload else 0
    assert memory.tracked - BATCHES <= memory.planned <= memory.tracked + on_their_way
    assert memory.allocated <= memory.requested * (1 + ALLOCATED_WITHIN)
    planned, tracked = memory.host
    assert planned <= tracked <= planned + BATCHES
    assert planned <= memory.pinned <= planned + BATCHES + (PINNED_BESIDES if "disk" in offload else 0)


def check_waits(steps: list[list[Wait]], micro_batches: int) -> None:
    most = WAITS_PER_STEP + micro_batches * WAITS_PER_MICRO_BATCH
    for waits in steps:
        assert len(waits) <= most, "\n".join(f"{count} x {wait}" for wait, count in Counter(waits).most_common())
