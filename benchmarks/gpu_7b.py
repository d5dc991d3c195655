"""A model of Mistral-7B's shape with random weights on a card that is held to 24 GiB, for `gpu.py`: two steps.

Where things live is what `--fit` chooses. Offloading to disk would take too long here, so it is left out where the
host's memory is not enough.
"""

import gc
import time
from functools import partial
from typing import Any

import torch
from gpu_findings import GIB, Findings
from gpu_steps import Training, config_of, global_batch
from mistral_7b_model import model_config

from fullft.hardware import available_host_bytes
from fullft.memory.choose import Plans, choose, fits, step_seconds
from fullft.memory.machine import CONTEXT_BYTES, Device
from fullft.memory.plan import Batch
from fullft.memory.speeds import measure_speeds

CARD = 24 * GIB
LENGTH = 512
STEPS = 2
SPARE = 4 * GIB  # of the host's memory, left to others
LONGER = 3  # the second case takes as many times as long as the first: it locks and moves three times as much
# The one that needs less of the host first.
CASES: dict[str, dict[str, Any]] = {
    "adamw_8bit, one micro-batch": {"optim": "adamw_8bit"},
    "adamw, two micro-batches": {"gradient_accumulation_steps": 2},
}
# A toy's card, and what its plan may take of it: blocks of 20 MiB, which are nothing on a card, are much of it.
TOY_CARD, TOY_PLANNED = 96 * 2**20, 40 * 2**20


def run(findings: Findings) -> None:
    """Hold the card to 24 GiB, and train."""
    free, total = torch.cuda.mem_get_info()
    card = TOY_CARD if findings.is_emulated else CARD - CONTEXT_BYTES
    if free < card:
        findings.skip(f"the card has {free / GIB:.1f} GiB free")
        return
    started = findings.seconds_left
    for number, (name, options) in enumerate(CASES.items()):
        if number and findings.seconds_left < LONGER * (started - findings.seconds_left):
            findings.left_out.append(name)
            continue
        findings.carry_out({name: partial(train, findings, name, card / total, options)})


def train(findings: Findings, name: str, share: float, options: dict[str, Any]) -> None:
    """Let `--fit` choose, build the model, and take two steps.

    Args:
        findings: to add to.
        name: of the case.
        share: of the card's memory that this process may take.
        options: of the run.
    """
    torch.cuda.set_per_process_memory_fraction(1.0)  # speeds are measured with a gigabyte
    shape = model_config("tiny" if findings.is_emulated else "7b")
    length, cuda = 32 if findings.is_emulated else LENGTH, torch.device("cuda")
    asked = config_of(precision="bf16-true", offload="auto", activation_checkpointing="auto", **options)
    asked.output_dir.mkdir(parents=True, exist_ok=True)
    batch, plans = Batch(1, length), Plans(shape)
    card = TOY_PLANNED if findings.is_emulated else int(share * torch.cuda.mem_get_info()[1])
    device = Device("the card", card, available_host_bytes() - SPARE, disk_bytes=0)
    started = time.perf_counter()
    speeds = measure_speeds(asked, shape, batch, cuda)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(share)
    config, line = choose(asked, plans, batch, device, lambda: speeds)
    planned = plans.of(config, batch)
    planning = time.perf_counter() - started
    if not fits(planned, device):
        findings.note(
            f"{name}: skipped. It needs {planned['host_bytes'] / GIB:.0f} GiB of the host's memory at the least, and "
            f"{device.host_bytes / GIB:.0f} GiB are free besides a reserve."
        )
        return
    findings.note(f"{name}: {line}.")
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    training = Training.of(config, shape, cuda)
    building = time.perf_counter() - started
    rows = global_batch(config, shape.vocab_size, 1, length)
    try:
        taken = [training.take_step(rows) for _ in range(STEPS)]
    finally:
        training.optimizer.close()
    (before, first), (after, second) = taken
    findings.add(
        f"{sum(each.numel() for each in training.model.parameters()):,} parameters, micro-batches of {length} tokens",
        {
            "case": name,
            "checkpointing": config.activation_checkpointing,
            "offload": str(config.placement),
            "planned, GiB": planned["peak_bytes"] / GIB,
            "allocated, GiB": torch.cuda.max_memory_allocated() / GIB,
            "reserved, GiB": torch.cuda.max_memory_reserved() / GIB,
            "host, planned, GiB": planned["host_bytes"] / GIB,
            "estimated, s": step_seconds(config, plans.facts(length), batch, speeds),
            "first step, s": first,
            "second step, s": second,
            "planning, s": planning,
            "building, s": building,
            "loss": f"{before:.3f} -> {after:.3f}",
        },
    )
    findings.require(after < before, f"{name}: the loss has not fallen: {before} -> {after}")
