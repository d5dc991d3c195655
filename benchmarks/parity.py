"""Compare the loop with Hugging Face `Trainer`, step by step: same model, rows and order, so same losses and weights.

    python benchmarks/parity.py                                                    # a tiny model, the demo's rows
    python benchmarks/parity.py --model FOLDER --dataset rows.json --steps 5       # a real one

Ours is the command that users type, `train.py`. Its log and its final weights are read back. Trainer gets the rows
unpadded, in our order, and does everything else itself: padding, mask, loss, divisor, clipping, AdamW, schedule. A
second Trainer run is the control: it averages the means of micro-batches, as was usual before num_items_in_batch. It
shows what a difference looks like.

It prints losses and gradient norms of every step, and the largest differences. It ends with 1 if the losses differ by
more than 1e-5, relative, or if the control does not differ.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import datasets
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    Qwen2Config,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed, as for train.py
# ruff: noqa: E402
from fullft.config.config import Config
from fullft.config.parse import parse_config
from fullft.data.load import load_data
from fullft.data.micro_batch import IGNORED

WORK = ROOT / "benchmarks" / "work"
DEMO = ROOT / "fullft" / "demo"
MICRO_BATCH, ACCUMULATION = 2, 4
TOLERANCE = 1e-5  # relative difference of a loss
VISIBLE = 1e-3  # least difference of the control: with less, the comparison could not have failed

Records = dict[str, list[float]]  # loss, gradient norm and learning rate of each step
Run = tuple[Records, PreTrainedModel]


def main() -> None:
    """Run ours, Trainer and the control, and print them side by side."""
    parser = argparse.ArgumentParser(description="Compare train.py with Hugging Face Trainer, step by step.")
    parser.add_argument("--model", help="folder or hub id of a model (default: a tiny Qwen2 with random weights)")
    parser.add_argument("--dataset", default=str(DEMO / "instructions.jsonl"), help="rows (default: the demo's)")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default: 20)")
    parser.add_argument("--max_length", type=int, default=256, help="tokens of the longest sequence (default: 256)")
    parser.add_argument(
        "--learning_rate", type=float, help="highest learning rate (default: 2e-5; for the tiny model 1e-3)"
    )
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()

    rate = arguments.learning_rate or (2e-5 if arguments.model else 1e-3)
    model = arguments.model or str(_tiny_model())
    config, flags = _options(model, arguments.dataset, arguments.steps, arguments.max_length, rate)
    rows, padding = _rows_in_order(config)
    ours = _run_ours(flags, config)
    trainers = {}
    for name, mean_of_means in (("trainer", False), ("control", True)):
        print(f"Running Hugging Face Trainer ({'mean of means' if mean_of_means else 'as it is'})", flush=True)
        trainers[name] = _run_trainer(config, rows, rate, mean_of_means)
    print(
        f"\n{arguments.model or 'tiny Qwen2, random weights'}; micro-batch {MICRO_BATCH} x accumulation "
        f"{ACCUMULATION}, {padding:.0%} padding in Trainer's\nfp32, AdamW, weight decay 0.01, 3 steps of warmup, "
        f"then linear from {rate:g}, clipped at 1.0"
    )
    sys.exit(_compare(config, ours, *trainers.values()))


# ---------------------------------------------------------------------------------------------- what both train


def _tiny_model() -> Path:
    """Save a tiny Qwen2 with the demo's tokenizer. It has biases and norms, which weight decay must spare."""
    folder = WORK / "parity-tiny"
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None,
            initializer_range=0.1,
        ),
        dtype=torch.float32,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _options(model: str, dataset: str, steps: int, max_length: int, rate: float) -> tuple[Config, list[str]]:
    options = f"--max_length {max_length} --val_size 0 --max_steps {steps} --per_device_train_batch_size {MICRO_BATCH} "
    options += (
        f"--gradient_accumulation_steps {ACCUMULATION} --precision fp32 --learning_rate {rate} --weight_decay 0.01 "
    )
    options += "--warmup_steps 3 --max_grad_norm 1 --logging_steps 1 --eval_strategy no --save_strategy no"
    paths = [
        "--model",
        model,
        "--dataset",
        dataset,
        "--output_dir",
        str(WORK / "parity-ours"),
        "--overwrite_output_dir",
    ]
    flags = [*paths, *options.split()]
    return parse_config(flags), flags


def _rows_in_order(config: Config) -> tuple[list[dict[str, list[int]]], float]:
    """Return the rows of all global batches, in the order of `train.py`, with the padding cut off.

    Returns:
        The rows' `input_ids` and `labels`, and the share of padding where a micro-batch is padded to its longest row.
    """
    batches = load_data(config, AutoTokenizer.from_pretrained(str(config.model))).train
    rows: list[dict[str, list[int]]] = []
    tokens = positions = 0
    for step in range(1, config.max_steps + 1):
        if len(rows) % config.global_batch_size:
            sys.exit(
                f"--steps {step - 1} is the most here: the epoch's last global batch is smaller, and Trainer would "
                "fill it up with rows of the next epoch"
            )
        for micro_batch in batches.global_batch(step):
            tokens += micro_batch.num_tokens
            positions += micro_batch.labels.numel()
            for ids, labels in zip(micro_batch.inputs["input_ids"], micro_batch.labels, strict=True):
                end = int((labels != IGNORED).nonzero().max()) + 1  # a row's last token is a target
                rows.append({"input_ids": ids[:end].tolist(), "labels": labels[:end].tolist()})
    assert sum(len(row["input_ids"]) for row in rows) == tokens, "padding was not found"
    return rows, 1 - tokens / positions


# ---------------------------------------------------------------------------------------------- the runs


def _run_ours(flags: list[str], config: Config) -> Records:
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    print("Running python train.py", *(flag.replace(f"{ROOT}/", "") for flag in flags), flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"train.py ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    records = [json.loads(line) for line in (config.output_dir / "log.jsonl").read_text().splitlines()]
    records = [record for record in records if "loss" in record]
    return {name: [record[name] for record in records] for name in ("loss", "grad_norm", "learning_rate")}


def _run_trainer(config: Config, rows: list[dict[str, list[int]]], rate: float, mean_of_means: bool) -> Run:
    """Train with Hugging Face `Trainer`.

    Args:
        config: of our run, whose model and length both share.
        rows: unpadded, in order.
        rate: the highest learning rate.
        mean_of_means: divide each micro-batch's loss by its own target tokens, and by the number of micro-batches.
    """
    model = _load(str(config.model))
    tokenizer = AutoTokenizer.from_pretrained(str(config.model))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    trainer = Trainer(
        model,
        TrainingArguments(
            str(WORK / "parity-trainer"),
            per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=ACCUMULATION,
            max_steps=config.max_steps,
            learning_rate=rate,
            lr_scheduler_type="linear",
            warmup_steps=3,
            weight_decay=0.01,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            bf16=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            train_sampling_strategy="sequential",
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
    )
    assert trainer.model_accepts_loss_kwargs, "Trainer does not hand num_items_in_batch to this model"
    trainer.model_accepts_loss_kwargs = not mean_of_means
    trainer.log = lambda record, *_: trainer.state.log_history.append(dict(record))  # records are kept, not printed
    trainer.train()
    records = [record for record in trainer.state.log_history if "grad_norm" in record]
    return {name: [record[name] for record in records] for name in ("loss", "grad_norm", "learning_rate")}, model


def _load(source: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="sdpa")
    dropout = {name: value for name, value in model.config.to_dict().items() if name.endswith(("dropout", "pdrop"))}
    if any(value for value in dropout.values() if isinstance(value, float)):
        sys.exit(f"the model has dropout ({dropout}), and each implementation draws it differently: set it to 0")
    return model


# ---------------------------------------------------------------------------------------------- the comparison


def _relative(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / abs(theirs)


def _compare(config: Config, ours: Records, trainer: Run, control: Run) -> int:
    """Print the steps, the largest differences and the verdict, and return the exit code."""
    (theirs, their_model), (means, control_model) = trainer, control
    print(f"{'':4}  {'loss':^35}  {'gradient norm':^35}  {'control: loss, norm':>19}")
    titles = f"{'ours':>12} {'Trainer':>12} {'relative':>9}"
    print(f"{'step':>4}  {titles}  {titles}  {'relative':>9} {'relative':>9}")
    largest = {"loss": 0.0, "grad_norm": 0.0, "control loss": 0.0, "control grad_norm": 0.0}
    for index in range(config.max_steps):
        cells, controls = [], []
        for name in ("loss", "grad_norm"):
            mine, reference = ours[name][index], theirs[name][index]
            difference, control_difference = _relative(mine, reference), _relative(mine, means[name][index])
            largest[name] = max(largest[name], difference)
            largest[f"control {name}"] = max(largest[f"control {name}"], control_difference)
            cells.append(f"{mine:12.8f} {reference:12.8f} {difference:9.1e}")
            controls.append(f"{control_difference:9.1e}")
        print(f"{index + 1:4}  {'  '.join(cells)}  {' '.join(controls)}")
    rates = max(abs(a - b) for a, b in zip(ours["learning_rate"], theirs["learning_rate"], strict=True))
    start, end = _load(str(config.model)), _load(str(config.output_dir))
    print(
        f"Largest relative difference: loss {largest['loss']:.1e}, gradient norm {largest['grad_norm']:.1e}; learning "
        f"rates differ by {rates:.1e}\n"
        f"Largest weight difference after {config.max_steps} steps: {_largest_difference(end, their_model):.1e}. "
        f"Weights moved by up to {_largest_difference(end, start):.1e}\n"
        f"Control, averaging the micro-batches' means: loss off by up to {largest['control loss']:.1e}, gradient norm "
        f"by {largest['control grad_norm']:.1e}, weights by {_largest_difference(end, control_model):.1e}"
    )
    equal, visible = largest["loss"] <= TOLERANCE, largest["control loss"] >= VISIBLE
    print(f"{'The losses are equal' if equal else 'THE LOSSES DIFFER'} (limit {TOLERANCE:g})")
    if not visible:
        print(f"THE CONTROL DOES NOT DIFFER by {VISIBLE:g}: this comparison could not have failed")
    return 0 if equal and visible else 1


def _largest_difference(a: PreTrainedModel, b: PreTrainedModel) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((left - right).detach().abs().max()) for left, right in pairs)


if __name__ == "__main__":
    main()
