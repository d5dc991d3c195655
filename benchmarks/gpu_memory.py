"""Planned bytes next to those of torch's allocator on the card, for `gpu.py`."""

import time
from functools import partial

import torch
from gpu_findings import Findings
from gpu_steps import config_of, shape_name, small_config
from memory_accuracy import track
from transformers import AutoModelForCausalLM

from fullft.config.config import Config
from fullft.memory.plan import Batch, plan_step
from fullft.model.precision import dtype_of

HOST = "optimizer=host,gradients=host"
ALL_HOST = f"{HOST},parameters=host"
# Precision, master weights, checkpointing, optimizer, accumulation, packing, offload.
Case = tuple[str, str, str, str, int, bool, str]
CASES: list[Case] = [
    ("bf16-true", "split", "none", "adamw", 2, False, "none"),
    ("bf16-true", "split", "none", "adamw", 2, True, "none"),
    ("bf16-true", "split", "full", "adamw", 2, True, HOST),
    ("bf16-mixed", "split", "none", "adamw", 2, False, "none"),
    ("bf16-true", "split", "full", "adamw", 2, False, ALL_HOST),
    ("fp32", "split", "none", "adamw", 1, False, "none"),
    ("bf16-true", "split", "selective", "adamw", 2, True, "none"),
    ("bf16-true", "split", "full", "adamw_8bit", 1, True, "none"),
    ("bf16-mixed", "split", "full", "adamw", 1, True, "none"),
    ("bf16-true", "split", "every_2", "adamw", 2, False, "optimizer=host"),
    ("bf16-true", "split", "full", "adamw", 2, False, "optimizer=disk,gradients=disk"),
    ("bf16-true", "stochastic", "none", "adamw", 1, False, "gradients=released"),
]
MIB = 2**20
WITHIN = 0.05  # of what was allocated: the allocator rounds, and matrix products have a workspace
TOY_WITHIN = 0.3  # where rounding weighs more, and attention that is not fused keeps more


def run(findings: Findings) -> None:
    """Compare the cases."""
    findings.note(
        "Planned on fake tensors; tracked tensor by tensor; allocated and reserved are the peaks of torch's allocator "
        "over what was there before the model. Pinned memory comes in blocks."
    )
    cases = CASES[:3] if findings.is_emulated else CASES
    findings.carry_out({" ".join(map(str, case)): partial(compare, findings, case) for case in cases})


def config_of_case(
    precision: str, masters: str, mode: str, optim: str, accumulation: int, packing: bool, offload: str
) -> Config:
    """Resolve the options of a case, in the order of `CASES`."""
    return config_of(
        precision=precision,
        master_weights=masters,
        activation_checkpointing=mode,
        optim=optim,
        gradient_accumulation_steps=accumulation,
        packing=packing,
        offload=offload,
        max_grad_norm=0.0 if "released" in offload else 1.0,
    )


def compare(findings: Findings, case: Case) -> None:
    """Plan a step, take it, and compare the peaks.

    Args:
        findings: to add to.
        case: one of `CASES`.
    """
    config = config_of_case(*case)
    precision, masters, mode, optim, accumulation, packing, offload = case
    model_config, length = small_config(findings.is_emulated), 64 if findings.is_emulated else 2048
    batch = Batch(1 if findings.is_emulated else 4, length, length)
    started = time.perf_counter()
    planned = plan_step(config, model_config, batch)
    planning = time.perf_counter() - started
    torch.manual_seed(0)
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    model = AutoModelForCausalLM.from_config(model_config, dtype=dtype_of(config.numerics.weights)).cuda().train()
    torch.cuda.reset_peak_memory_stats()
    tracked = track(config, model, batch)
    allocated = torch.cuda.max_memory_allocated() - allocated
    reserved = torch.cuda.max_memory_reserved() - reserved
    error = planned["peak_bytes"] / allocated - 1
    findings.add(
        f"The worst step of {shape_name(findings.is_emulated)}, random weights",
        {
            "precision": precision if masters == "split" else f"{precision}, {masters}",
            "checkpointing": mode,
            "optimizer": optim,
            "accumulation": str(accumulation),
            "packing": packing,
            "offload": offload,
            "planned, MiB": planned["peak_bytes"] / MIB,
            "tracked, MiB": tracked["peak_bytes"] / MIB,
            "allocated, MiB": allocated / MIB,
            "reserved, MiB": reserved / MIB,
            "planned / allocated": 1 + error,
            "host, planned, MiB": planned["host_bytes"] / MIB,
            "planning, s": planning,
        },
    )
    within = TOY_WITHIN if findings.is_emulated else WITHIN
    findings.require(abs(error) <= within, f"{precision} {mode} {optim} {offload}: the plan is off by {error:+.1%}")
