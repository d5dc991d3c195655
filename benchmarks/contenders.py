"""Set up the systems of the throughput benchmark: the usual listing, Hugging Face Trainer, TRL and ours.

Each trains in a process of its own, on the same rows, with the same model, AdamW and learning rate. The parts of a step
are timed from outside, for ours as for its peers: `train.py` runs as it is.
"""

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import datasets
import torch
import yaml
from accelerate.optimizer import AcceleratedOptimizer
from stopwatch import Stopwatch, after
from task import MAX_LENGTH, OURS, ROWS_PER_STEP, Task
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

import train  # found, since `task` is imported before
from fullft.config.parse import parse_config
from fullft.data.batches import Batches
from fullft.data.micro_batch import IGNORED
from fullft.hardware import peak_bytes
from fullft.model.loss import LossSum
from fullft.optim.adamw import AdamW
from fullft.run.log import Log

LISTING_LENGTH = 512  # tokens that the listing pads every row to
# Name -> rows that are padded together, and whether the model is compiled (`torch_compile`).
TRAINERS = {
    "Trainer, dynamic padding": (1, False),
    "Trainer, grouped by length, 4 rows at a time": (4, False),
    "Trainer, grouped by length, 8 rows at a time": (8, False),
    "Trainer, grouped by length, 8 rows at a time, compiled": (8, True),
    "Trainer, grouped by length, 16 rows at a time": (16, False),
    "Trainer, grouped by length, 16 rows at a time, compiled": (16, True),
}
ROWS_ALIKE = max(size for size, _ in TRAINERS.values())  # rows of similar length that the benchmark draws together
# Name -> whether rows are packed (else a step's rows lie behind each other), and whether the model is compiled.
TRLS = {
    "TRL SFTTrainer, packing": (True, False),
    "TRL SFTTrainer, packing, compiled": (True, True),
    "TRL SFTTrainer, padding-free": (False, False),
    "TRL SFTTrainer, padding-free, compiled": (False, True),
}

Row = dict[str, Any]
Result = dict[str, Any]

# ---------------------------------------------------------------------------------------------- ours


def train_ours(task: Task, name: str, profiled: bool = False) -> Result:
    """Train with `train.py`, and time the parts of each step.

    Args:
        task: the model and the rows.
        name: one of `OURS`.
        profiled: have torch's profiler record the third step. The result then has its table too.
    """
    watch = Stopwatch()
    watch.wrap(Batches, "global_batch", "data")
    watch.wrap(LossSum, "__call__", "forward")  # the decoder, and the head with its gradients, which are taken at once
    watch.wrap(torch.Tensor, "backward", "backward")
    for function in ("clip_gradients", "step", "zero_grad"):
        watch.wrap(AdamW, function, "optimizer")
    after(Log, "__enter__", watch.restart)
    after(Log, "step", watch.lap)
    run = partial(train.main, parse_config(task.flags(name)))
    table = _profile(run) if profiled else run()
    return {**_result_of(task, name), "laps": watch.laps, "profile": table}


def _profile(run: Callable[[], None]) -> str:
    """Run, and return torch's table of the third step: its operators, the most expensive first."""
    schedule = torch.profiler.schedule(wait=1, warmup=1, active=1, repeat=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], schedule=schedule) as profiler:
        after(Log, "step", profiler.step)
        run()
    return str(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=48))


def _result_of(task: Task, name: str) -> Result:
    """Read `train.py`'s log. Padding is not logged, so the batches are made once more to count it."""
    folder = task.output_dir(name)
    written = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    dealt = {"micro_batch_tokens": written.get("micro_batch_tokens") or 0, "isolates_documents": True}
    batches = task.batches(name).dealt(replace(parse_config(task.flags(name)), **dealt))
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    records = [record for record in records if "loss" in record]
    shutil.rmtree(folder)  # the trained weights are not needed
    steps = [batches.global_batch(record["step"]) for record in records]
    return {
        "tokens": [record["num_tokens"] for record in records],
        "positions": [sum(micro_batch.labels.numel() for micro_batch in step) for step in steps],
        "losses": [record["loss"] for record in records],
        "peak_bytes": records[-1]["memory_bytes"],
    }


# ---------------------------------------------------------------------------------------------- peers


class CountingCollator:
    """Counts tokens without padding, and positions, of the micro-batches of another collator."""

    def __init__(self, collate: Callable[[list[Row]], Row]) -> None:
        self.collate = collate
        self.counts: list[tuple[int, int]] = []

    def __call__(self, rows: list[Row]) -> Row:
        """Make a micro-batch."""
        batch = self.collate(rows)
        positions = batch["input_ids"].numel()
        tokens = int(batch["attention_mask"].sum()) if "attention_mask" in batch else positions
        self.counts.append((tokens, positions))
        return batch


def _arguments(task: Task, batch_size: int, accumulation: int) -> dict[str, Any]:
    """Return the arguments that all peers share: our optimizer, and nothing besides training."""
    return {
        "output_dir": str(task.folder / "peer"),
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 1,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
    }


def _load(task: Task) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(task.source, dtype=torch.float32, attn_implementation="sdpa")


def _tokenizer(task: Task) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(task.source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _rows_in_order(task: Task) -> list[Row]:
    """Return the rows in the order of our unpacked runs. At micro-batch 1 none of them is padded."""
    batches, rows = task.batches(next(iter(OURS))), []
    for step in range(1, batches.steps_per_epoch + 1):
        for micro_batch in batches.global_batch(step):
            rows.append(
                {"input_ids": micro_batch.inputs["input_ids"][0].tolist(), "labels": micro_batch.labels[0].tolist()}
            )
    return rows


def listing(task: Task) -> Trainer:
    """Build the lesson's Trainer: every row is padded to 512 tokens, and padding is trained on."""
    tokenizer = AutoTokenizer.from_pretrained(task.source)
    tokenizer.pad_token = tokenizer.eos_token

    def tokenise(row: Row) -> Row:
        text = f"### Instruction:\n{row['instruction']}\n\n### Response:\n{row['output']}"
        tokens = tokenizer(text, truncation=True, padding="max_length", max_length=LISTING_LENGTH)
        return {**tokens, "labels": tokens["input_ids"].copy()}

    rows = [json.loads(line) for line in task.file.read_text(encoding="utf-8").splitlines()]
    arguments = TrainingArguments(**_arguments(task, 1, ROWS_PER_STEP), train_sampling_strategy="sequential")
    return Trainer(_load(task), arguments, train_dataset=datasets.Dataset.from_list([tokenise(row) for row in rows]))


def dynamic_padding(task: Task, batch_size: int, compiled: bool) -> Trainer:
    """Build a Trainer on our tokens and targets, with each micro-batch padded to its longest row.

    Args:
        task: the model and the rows.
        batch_size: rows of a micro-batch, which have similar lengths. Single rows come in our order.
        compiled: compile the model. An untimed pass over all rows comes first, since it compiles at the first two
            lengths.
    """
    rows, accumulation = _rows_in_order(task), ROWS_PER_STEP // batch_size
    if batch_size > 1:
        # train_sampling_strategy="group_by_length" does this over a whole data set. In so short a run it would find few
        # rows of similar length. Groups are dealt out back and forth, so that every step has long rows and short ones.
        rows.sort(key=lambda row: len(row["input_ids"]))
        steps = len(rows) // ROWS_PER_STEP
        deals = [range(deal * steps, (deal + 1) * steps)[:: -1 if deal % 2 else 1] for deal in range(accumulation)]
        dealt = [group * batch_size for hand in zip(*deals, strict=True) for group in hand]
        rows = [row for start in dealt for row in rows[start : start + batch_size]]
    return Trainer(
        _load(task),
        TrainingArguments(
            **_arguments(task, batch_size, accumulation) | {"num_train_epochs": 2 if compiled else 1},
            torch_compile=compiled,
            train_sampling_strategy="sequential",
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(_tokenizer(task), label_pad_token_id=IGNORED),
    )


def trl(task: Task, packing: bool, compiled: bool) -> Trainer:
    """Build TRL's trainer on our tokens and targets, without padding.

    On a CPU it passes restarting positions and no mask. transformers makes a block-diagonal mask for SDPA from them, so
    packed documents do not see each other. Its loss never holds all logits, but recomputes them in backward. Without
    CUDA it multiplies in fp32 there (`trl/kernels/chunked_logprob.py`, 1.16). A loss function of the user's would avoid
    that, but makes it run the forward pass twice.

    Args:
        task: the model and the rows.
        packing: pack rows its way (best-fit decreasing). Else all rows of a step are one micro-batch.
        compiled: compile the model. An untimed pass over all rows comes first, since its lengths vary too.
    """
    from trl import SFTConfig, SFTTrainer  # type: ignore  # it is optional, and may be missing

    sizes = (1, task.packed_sequences) if packing else (ROWS_PER_STEP, 1)
    shared = _arguments(task, *sizes) | {"num_train_epochs": 2 if compiled else 1}
    own: Row = {"packing": True, "max_length": MAX_LENGTH} if packing else {"padding_free": True, "max_length": None}
    own["gradient_checkpointing"] = False  # it is on by default
    return SFTTrainer(
        _load(task),
        SFTConfig(**shared, **own, torch_compile=compiled),
        train_dataset=datasets.Dataset.from_list(_rows_in_order(task)),
        processing_class=_tokenizer(task),
    )


def has_trl() -> bool:
    """Return whether TRL is installed. It is optional."""
    return importlib.util.find_spec("trl") is not None


PEERS: dict[str, Callable[[Task], Trainer]] = {
    "listing": listing,
    **{
        name: partial(dynamic_padding, batch_size=size, compiled=compiled)
        for name, (size, compiled) in TRAINERS.items()
    },
    **{name: partial(trl, packing=packing, compiled=compiled) for name, (packing, compiled) in TRLS.items()},
}


def train_peer(task: Task, name: str) -> Result:
    """Train with a peer, and time the parts of each step.

    Args:
        task: the model and the rows.
        name: one of `PEERS`.
    """
    trainer, watch = PEERS[name](task), Stopwatch()
    trainer.data_collator = counting = CountingCollator(trainer.data_collator)
    # Records are kept, not printed.
    trainer.log = lambda record, *_, **__: trainer.state.log_history.append(dict(record))
    watch.wrap(
        trainer, "get_batch_samples", "data"
    )  # all micro-batches of a step, collated, with their targets counted
    watch.wrap(trainer, "compute_loss", "forward")
    watch.wrap(torch.Tensor, "backward", "backward")
    watch.wrap(trainer.accelerator, "clip_grad_norm_", "optimizer")
    watch.wrap(AcceleratedOptimizer, "step", "optimizer")
    watch.wrap(trainer.model, "zero_grad", "optimizer")
    after(trainer.callback_handler, "on_train_begin", watch.restart)
    after(trainer.callback_handler, "on_step_end", watch.lap)
    trainer.train()
    per_step = trainer.args.gradient_accumulation_steps
    steps = [counting.counts[i : i + per_step] for i in range(0, len(counting.counts), per_step)]
    assert len(steps) == len(watch.laps), "some micro-batches were collated but not trained"
    # The last pass is timed. Losses are the first pass's, since the other systems make only one.
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    count = len(steps) // int(trainer.args.num_train_epochs)
    return {
        "laps": watch.laps[-count:],
        "tokens": [sum(tokens for tokens, _ in step) for step in steps[-count:]],
        "positions": [sum(positions for _, positions in step) for step in steps[-count:]],
        "losses": losses[:count],
        "peak_bytes": peak_bytes(trainer.model.device),
    }
