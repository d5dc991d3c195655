"""The estimated time of a step next to the measured one, for `gpu.py`: what `--fit` ranks choices by."""

import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from gpu_findings import Findings
from gpu_steps import Training, config_of, global_batch, shape_name, small_config

from fullft.memory.choose import Plans, step_seconds
from fullft.memory.plan import Batch
from fullft.memory.speeds import measure_speeds

HOST = "optimizer=host,gradients=host"
STEPS = 3  # timed, after one that makes states
# What differs from a run in bf16 with split masters, eager, all on the device, of two micro-batches.
CASES: dict[str, dict[str, Any]] = {
    "all on the device": {},
    "full checkpointing": {"activation_checkpointing": "full"},
    "optimizer on the host": {"offload": "optimizer=host"},
    "optimizer and gradients on the host": {"offload": HOST},
    "all on the host": {"offload": f"{HOST},parameters=host", "activation_checkpointing": "full"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "moments in 8 bits": {"optim": "adamw_8bit"},
    "packed": {"packing": True},
    "gradients released": {"offload": "gradients=released", "gradient_accumulation_steps": 1, "max_grad_norm": 0.0},
    "all on disk": {
        "offload": "optimizer=disk,gradients=disk,parameters=disk",
        "activation_checkpointing": "full",
    },
}
TOY_CASES = 3


def run(findings: Findings) -> None:
    """Time the cases."""
    cases = {name: partial(compare, findings, name, changes) for name, changes in chosen(findings.is_emulated)}
    findings.carry_out(cases)


def chosen(is_emulated: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the cases."""
    for number, (name, changes) in enumerate(CASES.items()):
        if not is_emulated or number < TOY_CASES:
            yield name, {"precision": "bf16-true", "gradient_accumulation_steps": 2} | changes


def compare(findings: Findings, name: str, options: dict[str, Any]) -> None:
    """Measure the machine, estimate a step's time, and take steps.

    Args:
        findings: to add to.
        name: of the case.
        options: of the run.
    """
    config, model_config = config_of(**options), small_config(findings.is_emulated)
    sequences, length = (1, 64) if findings.is_emulated else (8, 1024)
    batch, device = Batch(sequences, length), torch.device("cuda")
    config.output_dir.mkdir(parents=True, exist_ok=True)
    speeds = measure_speeds(config, model_config, batch, device)
    estimated = step_seconds(config, Plans(model_config).facts(length), batch, speeds)
    training = Training.of(config, model_config, device)
    rows = global_batch(config, model_config.vocab_size, sequences, length)
    try:
        taken = [training.take_step(rows) for _ in range(1 + STEPS)]
    finally:
        training.optimizer.close()
    measured = statistics.median(seconds for _, seconds in taken[1:])
    findings.add(
        f"Steps of {shape_name(findings.is_emulated)}, micro-batches of {sequences} x {length:,} tokens",
        {
            "case": name,
            "estimated, ms": 1e3 * estimated,
            "measured, ms": 1e3 * measured,
            "estimated / measured": estimated / measured,
            "tokens/s": rows.num_tokens / measured,
            "model, TFLOP/s": speeds.flops / 1e12,
            "link, GB/s": speeds.link / 1e9,
            "updates, M parameters/s": (speeds.updates or 0.0) / 1e6,
        },
    )
    findings.require(taken[-1][0] < taken[0][0], f"{name}: the loss has not fallen: {[loss for loss, _ in taken]}")
