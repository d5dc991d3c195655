"""Compare sharded runs with one process, with DDP and FSDP2 in plain torch, and with Trainer, on the same rows.

    python benchmarks/sharding.py --dataset alpaca.json              # 15 minutes a round on two quiet cores
    python benchmarks/sharding.py --dataset alpaca.json --rounds 3 --ranks 2

SmolLM2-135M in fp32 on the CPU over gloo, 8 rows a step. Ours is the command that users type, `train.py --gpus N
--shard ...`. Systems take turns in every round, so that a slow hour of the machine slows all of them. All ranks share
this machine's cores: tokens per second compare systems with as many ranks, not numbers of ranks.

It prints three tables: losses next to those of one process; memory and bytes sent, planned and counted; speed, as a
ratio to DDP in the same round. It ends with 1 if losses differ, or plans are not what is counted.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smollm2_model import WORK, add_dataset_option, build_smollm2
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed, as for train.py
# ruff: noqa: E402
from fullft.config.parse import parse_config
from fullft.data.load import load_data

STAGES = ("none", "optimizer", "gradients", "full")
PEERS = {"ddp": "DDP, plain torch", "fsdp2": "FSDP2, plain torch", "trainer": "Trainer (DDP)"}
ROWS_PER_STEP = 8
TOLERANCE = 1e-5  # relative difference of a loss
OPTIONS = (
    f"--precision fp32 --max_length 256 --val_size 0 --global_batch_size {ROWS_PER_STEP} --learning_rate 2e-5 "
    "--per_device_train_batch_size 1 "
    "--lr_scheduler_type constant --logging_steps 1 --eval_strategy no --save_strategy no --compile false "
    "--activation_checkpointing none --offload none --overwrite_output_dir"
).split()


@dataclass
class Runs:
    """What a system did, round by round.

    Attributes:
        losses: of each step, in the first round.
        speeds: real tokens per second of each round, the first step left out.
        memory: what `memory.json` says; empty for peers.
        resident: the largest resident set of a rank, in bytes.
    """

    losses: list[float] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)
    resident: int = 0


def main() -> None:
    """Run all systems in turn, and print what they did."""
    parser = argparse.ArgumentParser(description="Compare sharded runs with one process, with plain torch and Trainer.")
    add_dataset_option(parser)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="numbers of ranks (default: 2 4)")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of each run (default: 3)")
    parser.add_argument("--rounds", type=int, default=1, help="how often each system runs (default: 1)")
    arguments = parser.parse_args()
    source, folder = build_smollm2(), WORK / "sharding"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    flags = ["--model", str(source), "--dataset", str(arguments.dataset), "--max_steps", str(arguments.steps), *OPTIONS]
    tokens = _write_rows(flags, folder)
    runs: dict[tuple[str, int], Runs] = defaultdict(Runs)
    for number in range(1, arguments.rounds + 1):
        print(f"Round {number}", flush=True)
        _run_ours(runs["one process", 1], flags, folder, 1, "none")
        for ranks in arguments.ranks:
            for stage in STAGES:
                _run_ours(runs[stage, ranks], flags, folder, ranks, stage)
            for peer in PEERS:
                _run_peer(runs[peer, ranks], source, folder, ranks, peer, tokens)
    sys.exit(_report(runs, arguments.ranks))


# ---------------------------------------------------------------------------------------------- the runs


def _write_rows(flags: list[str], folder: Path) -> list[int]:
    """Write the steps' rows for the peers, in the order of `train.py`; return the tokens of each step."""
    config = parse_config([*flags, "--output_dir", str(folder / "rows")])
    batches = load_data(config, AutoTokenizer.from_pretrained(str(config.model))).train
    steps = [list(batches.global_batch(step)) for step in range(1, config.max_steps + 1)]
    rows = [
        [{"input_ids": each.inputs["input_ids"][0].tolist(), "labels": each.labels[0].tolist()} for each in step]
        for step in steps
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    return [sum(each.num_tokens for each in step) for step in steps]


def _carry_out(command: list[str], what: str, ranks: int) -> None:
    print(f"  {what}, {ranks} rank{'s' if ranks > 1 else ''}", flush=True)
    threads = max(1, (os.cpu_count() or 1) // ranks)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{what} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def _run_ours(runs: Runs, flags: list[str], folder: Path, ranks: int, stage: str) -> None:
    output = folder / f"{stage}-{ranks}"
    sharding = ["--gpus", str(ranks), "--shard", stage] if ranks > 1 else []
    command = [str(ROOT / "train.py"), *flags, "--output_dir", str(output), *sharding]
    _carry_out(command, f"ours, --shard {stage}" if ranks > 1 else "ours, one process", ranks)
    records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    runs.losses = runs.losses or [record["loss"] for record in records]
    runs.speeds.append(statistics.median(record["tokens_per_second"] for record in records[1:]))
    runs.memory = json.loads((output / "memory.json").read_text())
    runs.resident = max(runs.resident, runs.memory["process"]["resident_peak_bytes"])


def _run_peer(runs: Runs, source: Path, folder: Path, ranks: int, peer: str, tokens: list[int]) -> None:
    result = folder / f"{peer}-{ranks}.json"
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    script = str(ROOT / "benchmarks" / "sharding_peers.py")
    _carry_out([*launcher, script, peer, str(source), str(folder / "rows.json"), str(result)], PEERS[peer], ranks)
    found = json.loads(result.read_text())
    runs.losses = runs.losses or found["losses"]
    speeds = [count / seconds for count, seconds in zip(tokens, found["seconds"], strict=True)]
    runs.speeds.append(statistics.median(speeds[1:]))
    runs.resident = max(runs.resident, *found["resident_bytes"])


# ---------------------------------------------------------------------------------------------- the report


def _report(runs: dict[tuple[str, int], Runs], counts: list[int]) -> int:
    """Print the tables, and return the exit code."""
    one = runs["one process", 1]
    has_failed = False
    print("\n| ranks | system | loss, relative difference to one process | tokens/s | times DDP | resident, largest |")
    print("|---|---|---|---|---|---|")
    for (system, ranks), each in runs.items():
        differences = [abs(a - b) / b for a, b in zip(each.losses, one.losses, strict=True)]
        has_failed |= max(differences) > TOLERANCE
        name = PEERS.get(system) or (f"ours, `--shard {system}`" if ranks > 1 else "ours, one process")
        ratio = ""
        if ranks > 1:
            ratios = [a / b for a, b in zip(each.speeds, runs["ddp", ranks].speeds, strict=True)]
            ratio = f"{statistics.median(ratios):.2f}"
        print(
            f"| {ranks} | {name} | {max(differences):.1e} | {statistics.median(each.speeds):.0f} | {ratio} | "
            f"{each.resident / 2**30:.2f} GiB |"
        )
    print("\n| ranks | `--shard` | peak per rank, planned | tracked | sent per rank and step, planned | counted |")
    print("|---|---|---|---|---|---|")
    for ranks in counts:
        for stage in STAGES:
            memory = runs[stage, ranks].memory
            planned, tracked = memory["planned"]["peak_bytes"], max(memory["ranks"])
            sent = {when: sum(memory["sent"][when].values()) for when in ("planned", "measured")}
            has_failed |= planned != tracked or sent["planned"] != sent["measured"]
            print(
                f"| {ranks} | `{stage}` | {planned / 2**30:.3f} GiB | {tracked / 2**30:.3f} GiB | "
                f"{sent['planned'] / 1e9:.3f} GB | {sent['measured'] / 1e9:.3f} GB |"
            )
    print("\nSOMETHING DIFFERS" if has_failed else "\nAll losses agree, and every plan is what was counted.")
    return int(has_failed)


if __name__ == "__main__":
    main()
