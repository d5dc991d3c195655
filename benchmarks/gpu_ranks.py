"""Two ranks over NCCL, on two cards, for `gpu.py`: speed, and memory and traffic as planned."""

import json
import shutil
import statistics
import subprocess
import sys
from functools import partial

import torch
from gpu_findings import GIB, Findings
from gpu_rows import prepare
from gpu_steps import ROOT

OPTIONS = (
    "--precision bf16-true --max_length 1024 --packing --val_size 0 --max_steps 6 --global_batch_size 8 "
    "--logging_steps 1 --eval_strategy no --save_strategy no --compile false --activation_checkpointing none "
    "--offload none --overwrite_output_dir"
).split()
STAGES = ("full", "none", "gradients", "optimizer")
LOSS_AS_ONE = 1e-2  # relative: sums in bf16, in other orders


def run(findings: Findings) -> None:
    """Train on one card and on two."""
    if (count := torch.cuda.device_count()) < 2:
        findings.skip(f"there is {count} card; the tests that need two are skipped too")
        return
    task = prepare(findings)
    flags = ["--model", str(task.source), "--dataset", str(task.file), *OPTIONS]
    alone: list[float] = []
    cases = {"one": partial(train, findings, flags, "", alone)}
    cases |= {stage: partial(train, findings, flags, stage, alone) for stage in STAGES}
    findings.carry_out(cases)


def train(findings: Findings, flags: list[str], stage: str, alone: list[float]) -> None:
    """Run the command that users type.

    Args:
        findings: to add to.
        flags: of all runs.
        stage: as `--shard`; empty for one card.
        alone: the losses on one card, which are put there.
    """
    output = ROOT / "benchmarks" / "work" / "gpu" / "ranks"
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--output_dir", str(output)]
    command += ["--gpus", "2", "--shard", stage] if stage else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, findings.seconds_left))
    print(done.stdout[-1000:], done.stderr[-3000:])
    if done.returncode:
        raise RuntimeError(f"ended with {done.returncode}: {done.stderr[-250:]}")
    records = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    memory = json.loads((output / "memory.json").read_text(encoding="utf-8"))
    shutil.rmtree(output)
    losses = [record["loss"] for record in records if "loss" in record]
    alone[:] = alone or losses
    difference = max(abs(one - other) / other for one, other in zip(losses, alone, strict=True))
    name = f"two cards, --shard {stage}" if stage else "one card"
    planned, tracked = memory["planned"]["peak_bytes"], memory["measured"]["peak_bytes"]
    findings.add(
        "Runs of six steps",
        {
            "ranks": name,
            "tokens/s": statistics.median(each["tokens_per_second"] for each in records[2:] if "loss" in each),
            "losses differ by": difference,
            "planned, GiB": planned / GIB,
            "tracked, GiB": tracked / GIB,
            "allocated, GiB": memory["process"]["allocated_peak_bytes"] / GIB,
        },
    )
    findings.require(difference < LOSS_AS_ONE, f"{name}: losses differ by {difference:.1e} from those on one card")
    findings.require(planned == tracked, f"{name}: planned {planned}, tracked {tracked} bytes")
