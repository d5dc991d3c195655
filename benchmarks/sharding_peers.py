"""Peers of `benchmarks/sharding.py`: one process of a run over ranks, started by torchrun.

    torchrun --nproc-per-node 2 benchmarks/sharding_peers.py ddp MODEL ROWS RESULT

The peers are `ddp`, a loop of plain torch around `DistributedDataParallel`; `fsdp2`, the same around `fully_shard`, as
PyTorch's tutorial has it; and `trainer`, Hugging Face Trainer. On CPUs accelerate knows DDP alone, so that Trainer's
FSDP2 cannot be compared here. All train in fp32 over gloo, on the same rows: ROWS holds a list of steps, each a list of
rows with `input_ids` and `labels`, which the ranks take in turn. The first rank writes losses, seconds and peaks to
RESULT.
"""

import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments  # noqa: E402

RATE = 2e-5
Step = list[dict[str, list[int]]]


def train_by_torch(model: torch.nn.Module, steps: list[Step], shards: bool) -> tuple[list[float], list[float]]:
    """Train as PyTorch's documentation shows, with the divisor right: the target tokens of the whole step.

    Args:
        model: in training mode.
        steps: the rows of each.
        shards: by FSDP2, in place of DDP.

    Returns:
        The losses of the steps, and their seconds.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    replica: Any = DistributedDataParallel(model) if not shards else _sharded(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    losses, seconds = [], []
    for step in steps:
        start = time.perf_counter()
        num_targets = sum(sum(label != -100 for label in row["labels"][1:]) for row in step)
        mine, total = step[rank::ranks], torch.zeros(())
        for number, row in enumerate(mine):
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            with nullcontext() if shards or number == len(mine) - 1 else replica.no_sync():
                logits = replica(input_ids=ids, use_cache=False).logits[0, :-1]
                loss = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum") / num_targets
                (loss * ranks).backward()  # both divide gradients by the number of ranks
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        losses.append(total.item())
        seconds.append(time.perf_counter() - start)
    return losses, seconds


def _sharded(model: torch.nn.Module) -> torch.nn.Module:
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer)
    return fully_shard(model)


class _Clock(TrainerCallback):
    """Notes when each step begins and ends."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def train_by_trainer(model: torch.nn.Module, steps: list[Step], folder: Path) -> tuple[list[float], list[float]]:
    """Train with Hugging Face Trainer."""
    ranks, clock = int(os.environ["WORLD_SIZE"]), _Clock()
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=len(steps[0]) // ranks,
        max_steps=len(steps),
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo",
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
    )

    def collate(rows: Step) -> dict[str, torch.Tensor]:
        (row,) = rows
        return {name: torch.tensor([values]) for name, values in row.items()}

    rows = [row for step in steps for row in step]
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[clock])
    trainer.train()
    return [record["loss"] for record in trainer.state.log_history if "loss" in record], clock.seconds


def resident_peak() -> int:
    """Return the peak of this process's resident set, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not tell")


def main() -> None:
    """Train as one rank."""
    peer, source, rows, result = sys.argv[1:]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group("gloo")
    steps = json.loads(Path(rows).read_text())
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).train()
    if peer == "trainer":
        losses, seconds = train_by_trainer(model, steps, Path(result).parent / "trainer")
    else:
        losses, seconds = train_by_torch(model, steps, shards=peer == "fsdp2")
    peaks: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(peaks, resident_peak())
    if dist.get_rank() == 0:
        Path(result).write_text(json.dumps({"losses": losses, "seconds": seconds, "resident_bytes": peaks}))


if __name__ == "__main__":
    main()
