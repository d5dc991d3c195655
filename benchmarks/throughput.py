"""How fast it trains beside the usual listing, Hugging Face Trainer and TRL, and how fast this processor could.

    python benchmarks/throughput.py --dataset alpaca.json --plot docs/throughput.png   # hours on two cores
    python benchmarks/throughput.py --dataset alpaca.json --only ours                  # those with this in their names

Owns one table and one picture: real (non-padding) tokens per second of SmolLM2-135M on the CPU. Every system makes one
pass over the same rows with the same AdamW, in a process of its own, and the repeats go round all systems, so that a
slow hour of the machine slows them all. The limit is what the model's own matrix products take when nothing else is
done, measured in the same round; it needs a quiet machine, for of its products those that take long cannot dodge
another program. A finished run is not repeated, so that a command that was stopped goes on.
"""

# ruff: noqa: E402
import argparse
import importlib.util
import json
import os
import random
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from smollm2_model import WORK, build_smollm2
from torch import nn
from torch.nn.functional import linear
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed, as for train.py

from fullft.config import parse_config
from fullft.data import Batches, load_data
from fullft.memory.allocator import peak_bytes
from fullft.micro_batch import IGNORED
from fullft.rows import load_rows

ROWS_PER_STEP = 16
MAX_LENGTH = 1024  # of a row, and of a packed sequence
LISTING_LENGTH = 512  # that the listing pads every row to
WARM_UP = 2  # steps that do not count
LIMIT = "limit"
BEST = "Trainer, its best"

Row = dict[str, Any]
Result = dict[str, Any]

# ---------------------------------------------------------------------------------------------- ours


@dataclass(frozen=True)
class Ours:
    """One way to call `train.py`.

    Attributes:
        label: what the table calls it.
        options: that tell it apart, as on the command line.
        packing: whether rows share sequences of `MAX_LENGTH` tokens.
    """

    label: str
    options: str
    packing: bool = False

    @property
    def name(self) -> str:
        """Tell it from the peers."""
        return f"ours, {self.label}"


_SPLIT = "--precision bf16-true --master_weights split"
OURS = [
    Ours("bf16-mixed", "--precision bf16-mixed"),
    Ours("bf16-mixed, packing", "--precision bf16-mixed", packing=True),
    Ours("bf16-true split", _SPLIT),
    Ours("bf16-true split, packing", _SPLIT, packing=True),
]
# Nothing is left to the memory that happens to be free, and nothing but training is done.
COMMON = (
    "--val_size 0 --num_train_epochs 1 --per_device_train_batch_size 1 --learning_rate 2e-5 --max_grad_norm 1 "
    "--activation_checkpointing none --offload none --eval_strategy no --save_strategy no --logging_steps 1 "
    f"--max_length {MAX_LENGTH} --overwrite_output_dir"
)


@dataclass(frozen=True)
class Task:
    """What all systems train on.

    Attributes:
        source: the model's folder.
        folder: for the rows and the results.
        rows: of the file that everybody reads.
        tokens: in those rows, as our tokenising counts them.
        mean_context: tokens of the document that the average token is in: what attention's cost goes by.
    """

    source: Path
    folder: Path
    rows: int
    tokens: int
    mean_context: float

    @property
    def file(self) -> Path:
        """The rows."""
        return self.folder / "rows.jsonl"

    @property
    def mean_length(self) -> int:
        """Tokens of the average row."""
        return round(self.tokens / self.rows)

    @property
    def packed_accumulation(self) -> int:
        """Packed sequences that hold about as many tokens as a step's rows."""
        return max(1, round(ROWS_PER_STEP * self.tokens / self.rows / MAX_LENGTH))

    def flags(self, ours: Ours) -> list[str]:
        """Give a command line for `train.py`."""
        flags = ["--model", str(self.source), "--dataset", str(self.file)]
        flags += ["--output_dir", str(self.folder / _slug(ours.name)), *COMMON.split(), *ours.options.split()]
        accumulation = self.packed_accumulation if ours.packing else ROWS_PER_STEP
        flags += ["--gradient_accumulation_steps", str(accumulation)]
        return [*flags, "--packing"] if ours.packing else flags

    def batches(self, ours: Ours) -> Batches:
        """Give the batches that `train.py` trains on."""
        return load_data(parse_config(self.flags(ours)), AutoTokenizer.from_pretrained(self.source)).train


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def prepare(dataset: str, steps: int) -> Task:
    """Choose the rows, once, and write them to a file that every system reads.

    Args:
        dataset: Alpaca rows, any source that `train.py` reads.
        steps: optimizer steps that the rows are enough for.
    """
    source = build_smollm2()
    # Whatever changes the figures is in the name: results of another file, length or number of threads do not mix.
    folder = WORK / "throughput" / f"{_slug(Path(dataset).stem)}-{steps}-steps-{torch.get_num_threads()}-threads"
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["--model", str(source), "--dataset", dataset, "--output_dir", str(folder), *COMMON.split()]
    config = parse_config(flags)
    tokenised = load_data(config, AutoTokenizer.from_pretrained(source)).train.rows  # without rows that teach nothing
    count = steps * ROWS_PER_STEP
    if len(tokenised) < count:
        sys.exit(f"--steps {len(tokenised) // ROWS_PER_STEP} is the most here: {dataset} has {len(tokenised)} rows")
    chosen = tokenised.select(sorted(random.Random(0).sample(range(len(tokenised)), count)))
    lengths = chosen["num_tokens"][:]
    task = Task(source, folder, count, sum(lengths), sum(length**2 for length in lengths) / sum(lengths))
    lines = "".join(json.dumps(row) + "\n" for row in load_rows(config).select(chosen["row"][:]))
    if task.file.is_file() and task.file.read_text(encoding="utf-8") != lines:
        sys.exit(f"{folder} holds results of other rows: remove it")
    task.file.write_text(lines, encoding="utf-8")
    return task


# ---------------------------------------------------------------------------------------------- peers


class Clock(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Notes when steps end. From end to end a step holds all that it costs: collating, too, which ours counts."""

    def __init__(self) -> None:
        """Start without any."""
        self.marks: list[float] = []

    def on_train_begin(self, *_: object, **__: object) -> None:
        """Note when the first step begins."""
        self.marks.append(time.perf_counter())

    def on_step_end(self, *_: object, **__: object) -> None:
        """Note when a step ends."""
        self.marks.append(time.perf_counter())


class CountingCollator:
    """Counts what another collator makes: tokens that are no padding, and positions."""

    def __init__(self, collate: Callable[[list[Row]], Row]) -> None:
        """Wrap a collator."""
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
    """Give what all peers share: the optimizer of ours, and nothing done beside training."""
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
        "use_cpu": True,
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
    """Take the rows in the order in which our unpacked runs train them; at micro-batch 1 none is padded."""
    batches, rows = task.batches(OURS[0]), []
    for step in range(1, batches.steps_per_epoch + 1):
        for micro_batch in batches.global_batch(step):
            rows.append(
                {"input_ids": micro_batch.inputs["input_ids"][0].tolist(), "labels": micro_batch.labels[0].tolist()}
            )
    return rows


def listing(task: Task) -> Trainer:
    """The lesson's: every row padded to 512, padding trained on."""
    tokenizer = AutoTokenizer.from_pretrained(task.source)
    tokenizer.pad_token = tokenizer.eos_token

    def tokenise(row: Row) -> Row:
        text = f"### Instruction:\n{row['instruction']}\n\n### Response:\n{row['output']}"
        tokens = tokenizer(text, truncation=True, padding="max_length", max_length=LISTING_LENGTH)
        return {**tokens, "labels": tokens["input_ids"].copy()}

    rows = [json.loads(line) for line in task.file.read_text(encoding="utf-8").splitlines()]
    arguments = TrainingArguments(**_arguments(task, 1, ROWS_PER_STEP), train_sampling_strategy="sequential")
    return Trainer(_load(task), arguments, train_dataset=datasets.Dataset.from_list([tokenise(row) for row in rows]))


def dynamic_padding(task: Task, batch_size: int, grouped: bool) -> Trainer:
    """Trainer on our tokens and targets, each micro-batch padded to its longest row.

    Args:
        task: what to train on.
        batch_size: rows of a micro-batch.
        grouped: rows of like length share a step, else they come in the order of ours.
    """
    rows = _rows_in_order(task)
    if grouped:
        # As train_sampling_strategy="group_by_length" does, by its own function, which sorts the rows of 50 steps at
        # once. In so short a run it would sort a quarter of the rows at once, and pad more than in a long one. The
        # steps are shuffled so that the warm-up does not take the longest.
        lengths, steps = [len(row["input_ids"]) for row in rows], range(0, len(rows), ROWS_PER_STEP)
        order = get_length_grouped_indices(lengths, ROWS_PER_STEP, mega_batch_mult=min(len(steps), 50))
        rows = [rows[i] for start in random.Random(0).sample(steps, len(steps)) for i in order[start:][:ROWS_PER_STEP]]
    return Trainer(
        _load(task),
        TrainingArguments(
            **_arguments(task, batch_size, ROWS_PER_STEP // batch_size), train_sampling_strategy="sequential"
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(_tokenizer(task), label_pad_token_id=IGNORED),
    )


def trl_packing(task: Task) -> Trainer:
    """TRL's packing as it comes (best-fit decreasing, no padding), on our tokens and targets.

    On a CPU it gives the model restarting positions and no mask, from which transformers makes a block-diagonal mask
    for SDPA: packed documents do not see each other. Its loss never holds all logits, but recomputes them in backward,
    and there, without CUDA, multiplies in fp32 (`trl/kernels/chunked_logprob.py`, 1.16); what would avoid that, a loss
    function of one's own, makes it run the forward a second time.
    """
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found, unused-ignore]  # may be missing

    shared = _arguments(task, 1, task.packed_accumulation)
    return SFTTrainer(
        _load(task),
        SFTConfig(**shared, packing=True, max_length=MAX_LENGTH, gradient_checkpointing=False),  # on by default
        train_dataset=datasets.Dataset.from_list(_rows_in_order(task)),
        processing_class=_tokenizer(task),
    )


PEERS: dict[str, Callable[[Task], Trainer]] = {
    "listing": listing,
    "Trainer, dynamic padding": partial(dynamic_padding, batch_size=1, grouped=False),
    BEST: partial(dynamic_padding, batch_size=8, grouped=True),
    "TRL SFTTrainer, packing": trl_packing,
}


def train_peer(task: Task, name: str) -> Result:
    """Train with a peer, and say how each step went."""
    trainer, clock = PEERS[name](task), Clock()
    trainer.data_collator = counting = CountingCollator(trainer.data_collator)
    trainer.add_callback(clock)
    # The records are kept, not printed.
    trainer.log = lambda record, *_, **__: trainer.state.log_history.append(dict(record))
    trainer.train()
    seconds = [end - start for start, end in zip(clock.marks, clock.marks[1:], strict=False)]
    per_step = trainer.args.gradient_accumulation_steps
    steps = [counting.counts[i : i + per_step] for i in range(0, len(counting.counts), per_step)]
    assert len(steps) == len(seconds), "micro-batches were collated that were not trained"
    return {
        "seconds": seconds,
        "tokens": [sum(tokens for tokens, _ in step) for step in steps],
        "positions": [sum(positions for _, positions in step) for step in steps],
        "losses": [record["loss"] for record in trainer.state.log_history if "loss" in record],
        "peak_bytes": peak_bytes(torch.device("cpu")),
    }


# ---------------------------------------------------------------------------------------------- the limit


def measure_limit(task: Task) -> Result:
    """Measure how fast the model's matrix products alone could train, in micro-batches of two sizes.

    Logits are counted at every position, as the systems here compute them; a loop that left out those that are no
    targets could pass this limit.
    """
    config = AutoConfig.from_pretrained(task.source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = Counter(
        (module.in_features, module.out_features) for module in model.modules() if isinstance(module, nn.Linear)
    )
    # Scores and weighted values, forward and twice in backward; a causal token sees half of its document on average.
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    attention = 12 * config.num_hidden_layers * width * task.mean_context / 2
    return {
        "packed": _limit_of(shapes, attention, MAX_LENGTH),
        "row": _limit_of(shapes, attention, task.mean_length),
    }


def _limit_of(shapes: Counter[tuple[int, int]], attention: float, tokens: int) -> dict[str, float]:
    """Add up the products of one micro-batch.

    Args:
        shapes: how many layers have so many inputs and outputs.
        attention: its operations per token.
        tokens: of the micro-batch.
    """
    seconds = operations = best = 0.0
    for (inputs, outputs), count in shapes.items():
        x, weight, gradient = (
            torch.randn(shape, dtype=torch.bfloat16)
            for shape in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
        )
        products: tuple[Callable[[], torch.Tensor], ...] = (
            partial(linear, x, weight),  # forward
            partial(torch.mm, gradient, weight),  # of the input
            partial(torch.mm, gradient.t(), x),  # of the weight
        )
        for product in products:
            elapsed, own = _seconds(product), 2 * tokens * inputs * outputs
            seconds, operations, best = seconds + count * elapsed, operations + count * own, max(best, own / elapsed)
    seconds, operations = seconds + attention * tokens / best, operations + attention * tokens
    return {"tokens_per_second": tokens / seconds, "gflops": operations / seconds / 1e9, "best_gflops": best / 1e9}


def _seconds(product: Callable[[], torch.Tensor]) -> float:
    """Time a product: the fastest of some, for a limit is what nothing disturbs."""
    product()
    times: list[float] = []
    while len(times) < 5 or sum(times) < 1.0:
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    return min(times)


# ---------------------------------------------------------------------------------------------- runs


def carry_out(task: Task, name: str, repeat: int, fresh: bool) -> None:
    """Run a system in a process of its own, unless that has been done."""
    file = result_file(task, name, repeat)
    if file.is_file() and not fresh:
        print(f"{repeat}: {name}: done before", flush=True)
        return
    ours = next((ours for ours in OURS if ours.name == name), None)
    staging = file.with_suffix(".tmp")
    if ours is None:
        command = [__file__, "--child", name, "--task", json.dumps(asdict(task), default=str), "--out", str(staging)]
        print(f"{repeat}: {name}", flush=True)
    else:
        command = [str(ROOT / "train.py"), *task.flags(ours)]
        shown = [word.removeprefix(f"{ROOT}/") for word in command]
        print(f"{repeat}: {name}: python {shlex.join(shown)}", flush=True)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    if ours is not None:
        staging.write_text(json.dumps(_result_of(task, ours)), encoding="utf-8")
    staging.replace(file)  # gets its name only when it is complete
    if name != LIMIT:
        print(f"   {speed(json.loads(file.read_text(encoding='utf-8'))):,.0f} tokens/s", flush=True)


def result_file(task: Task, name: str, repeat: int) -> Path:
    """Name the file of a run's result."""
    return task.folder / f"{_slug(name)}-{repeat}.json"


def _result_of(task: Task, ours: Ours) -> Result:
    """Read what `train.py` logged; make its batches once more for what it does not log, the padding."""
    folder, batches = task.folder / _slug(ours.name), task.batches(ours)
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    records = [record for record in records if "loss" in record]
    shutil.rmtree(folder)  # the trained weights are of no use here
    steps = [batches.global_batch(record["step"]) for record in records]
    return {
        "seconds": [record["num_tokens"] / record["tokens_per_second"] for record in records],
        "tokens": [record["num_tokens"] for record in records],
        "positions": [sum(micro_batch.labels.numel() for micro_batch in step) for step in steps],
        "losses": [record["loss"] for record in records],
        "peak_bytes": records[-1]["memory_bytes"],
    }


def speed(result: Result) -> float:
    """Give real tokens per second after the warm-up."""
    if len(result["seconds"]) <= WARM_UP:
        sys.exit(f"nothing is left after {WARM_UP} steps of warm-up: take more --steps")
    return float(sum(result["tokens"][WARM_UP:]) / sum(result["seconds"][WARM_UP:]))


def run_child(name: str, task: str, out: Path) -> None:
    """Do the work of one process, and write its result."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    fields = json.loads(task)
    values = Task(**{**fields, "source": Path(fields["source"]), "folder": Path(fields["folder"])})
    result = measure_limit(values) if name == LIMIT else train_peer(values, name)
    out.write_text(json.dumps(result), encoding="utf-8")


# ---------------------------------------------------------------------------------------------- reports


def read(task: Task, repeats: int) -> dict[str, list[Result]]:
    """Give the results that there are, of each system."""
    results = {}
    for name in (*PEERS, *(ours.name for ours in OURS), LIMIT):
        files = [result_file(task, name, repeat) for repeat in range(1, repeats + 1)]
        found = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
        if found:
            results[name] = found
    return results


def limit_of(results: dict[str, list[Result]], kind: str, figure: str = "tokens_per_second") -> float | None:
    """Give the median of a figure of the limit.

    Args:
        results: of all systems.
        kind: "packed" or "row".
        figure: of `_limit_of`.
    """
    values = [result[kind][figure] for result in results.get(LIMIT, [])]
    return statistics.median(values) if values else None


def table(results: dict[str, list[Result]]) -> list[tuple[str, ...]]:
    """Make the table's rows."""
    rows: list[tuple[str, ...]] = [
        ("system", "tokens/s", "min-max", f"x {BEST}", "padding", "peak, GiB", "first loss", "share of the limit"),
        ("---", *["---:"] * 7),
    ]
    reference = statistics.median(map(speed, results[BEST])) if BEST in results else None
    limit = limit_of(results, "packed")
    for name, own in results.items():
        if name == LIMIT:
            continue
        speeds = [speed(result) for result in own]
        median = statistics.median(speeds)
        padding = 1 - sum(own[0]["tokens"]) / sum(own[0]["positions"])
        rows.append(
            (
                name,
                f"{median:,.0f}",
                f"{min(speeds):,.0f}-{max(speeds):,.0f}",
                f"{median / reference:.2f}" if reference else "?",
                f"{padding:.1%}",
                f"{statistics.median(result['peak_bytes'] for result in own) / 2**30:.2f}",
                f"{own[0]['losses'][0]:.4f}",
                f"{median / limit:.0%}" if limit and name.startswith("ours") else "",
            )
        )
    return rows


def describe_limit(results: dict[str, list[Result]], task: Task) -> list[str]:
    """Say what the limit is, and whether the systems that do the same work agree."""
    lines = []
    for kind, tokens in (("packed", MAX_LENGTH), ("row", task.mean_length)):
        limit = limit_of(results, kind)
        if limit is not None:
            speeds = [result[kind]["tokens_per_second"] for result in results[LIMIT]]
            lines.append(
                f"Limit, matrix products of {tokens} tokens alone: {limit:,.0f} tokens/s ({min(speeds):,.0f}-"
                f"{max(speeds):,.0f}), {limit_of(results, kind, 'gflops'):,.0f} GFLOP/s on average, "
                f"{limit_of(results, kind, 'best_gflops'):,.0f} at best"
            )
    pair = "Trainer, dynamic padding", OURS[0].name
    if all(name in results for name in pair):
        theirs, ours = (results[name][0]["losses"] for name in pair)
        largest = max(abs(a - b) / abs(a) for a, b in zip(theirs, ours, strict=True))
        lines.append(f"{pair[1]} and {pair[0]}: same rows, same order; losses differ by at most {largest:.1e}")
    return lines


def plot(results: dict[str, list[Result]], file: Path) -> None:
    """Draw each system's median speed, and the limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in results if name != LIMIT]
    medians = [statistics.median(map(speed, results[name])) for name in names]
    limit = limit_of(results, "packed")
    figure, axes = pyplot.subplots(figsize=(9, 1.4 + 0.42 * len(names)), layout="constrained")
    colours = ["#1f5a99" if name.startswith("ours") else "#a8a8a8" for name in names]
    bars = axes.barh(names, medians, color=colours, height=0.68)
    axes.bar_label(bars, labels=[f"{median:,.0f}" for median in medians], padding=4, fontsize=9)
    axes.invert_yaxis()
    if limit is not None:
        axes.axvline(limit, color="#d9602b", linestyle="--", linewidth=1.3)
        label = f"limit: matrix products alone, {limit:,.0f}"
        axes.annotate(label, (limit, 1), xycoords=("data", "axes fraction"), xytext=(-5, 4),
                      textcoords="offset points", ha="right", color="#d9602b", fontsize=9)  # fmt: skip
    axes.set_xlim(0, 1.1 * max(*medians, limit or 0))
    axes.set_xlabel("real tokens per second (without padding), median")
    axes.grid(axis="x", linewidth=0.5, alpha=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=9)
    figure.suptitle(f"SmolLM2-135M, full fine-tuning on {_processor()}", fontsize=11)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _processor() -> str:
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'s' if threads > 1 else ''}"


def main() -> None:
    """Carry out what has not been, then print the table and draw the picture of what there is."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--dataset", help="Alpaca rows: any source that train.py reads")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each system, in turn (3)")
    parser.add_argument("--steps", type=int, default=12, help=f"optimizer steps of {ROWS_PER_STEP} rows (12)")
    parser.add_argument("--only", default="", help=f'systems with this in their names, or "{LIMIT}" (default: all)')
    parser.add_argument("--fresh", action="store_true", help="repeat what has been done")
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    for hidden in ("--child", "--task", "--out"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # everybody trains on the CPU
    if arguments.child:
        return run_child(arguments.child, arguments.task, Path(arguments.out))
    if not arguments.dataset:
        parser.error("--dataset is required")
    datasets.disable_progress_bars()

    task = prepare(arguments.dataset, arguments.steps)
    names = [name for name in (*PEERS, *(ours.name for ours in OURS), LIMIT) if arguments.only in name]
    if importlib.util.find_spec("trl") is None:
        print("TRL is left out: pip install trl", flush=True)
        names = [name for name in names if not name.startswith("TRL")]
    for repeat in range(1, arguments.repeats + 1):
        for name in names:
            carry_out(task, name, repeat, arguments.fresh)
    results = read(task, arguments.repeats)
    print(
        f"\nSmolLM2-135M-Instruct, {_processor()}: one pass over {task.rows} rows of {task.mean_length} tokens on "
        f"average, {ROWS_PER_STEP} a step (packed: {task.packed_accumulation} x {MAX_LENGTH} tokens);\nreal tokens "
        f"per second after {WARM_UP} steps, median of up to {arguments.repeats} runs; peak: resident set\n"
    )
    for cells in table(results):
        print(f"| {' | '.join(cells)} |")
    print("", *describe_limit(results, task), sep="\n")
    if arguments.plot is not None:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
