"""Every option: its name, unit, default and limits. Flags, YAML keys, `--help` and README's table come from here.

Owns which options there are, how they are checked against each other, and what follows from them. Imports nothing
heavy. `python -m fullft.config` prints README's table.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fullft.errors import OptionsError
from fullft.options import by_name, option, options_table, read_flags, read_yaml

DEMO_FOLDER = Path(__file__).parent / "demo"
DEFAULT_DATASET, DEFAULT_DATASET_SPLIT = "tatsu-lab/alpaca", "train[:1000]"
COLUMNS = ("instruction", "input", "output", "prompt", "completion", "messages", "conversations", "text")
NEWEST = "newest"  # what a bare --resume_from_checkpoint means


@dataclass(frozen=True)
class Config:
    """One training run. Names follow Hugging Face's `TrainingArguments` and TRL."""

    # --- model and data
    model: str | None = option(
        None,
        "hub id or folder of a causal language model",
        group="model and data",
        aliases=("model_name_or_path",),
        shown="the built-in demo",
    )
    trust_remote_code: bool = option(False, "run model code that comes with the weights")
    dataset: str | None = option(
        None,
        "hub id, or a .json .jsonl .csv .parquet .txt file or a folder of them",
        aliases=("dataset_name",),
        shown=DEFAULT_DATASET,
    )
    dataset_split: str | None = option(
        None, "which rows, as in train[:1000]", shown=f"train; {DEFAULT_DATASET}: {DEFAULT_DATASET_SPLIT}"
    )
    dataset_text_field: str = option("text", "the column of plain text")
    columns: dict[str, str] = option(
        {}, "ours=yours pairs that rename columns, as in output=answer", choices=COLUMNS, shown="as named"
    )
    max_length: int = option(512, "longest sequence", unit="tokens", at_least=2)
    packing: bool = option(False, "fill sequences with several documents, each isolated from the others")
    train_on_prompt: bool = option(False, "count prompt tokens in the loss too")
    val_size: float = option(0.05, "rows held out for evaluation", unit="fraction of rows", at_least=0, below=1)

    # --- run
    output_dir: str | None = option(
        None,
        "folder for everything that the run writes",
        group="run",
        shown="./full-ft-<model's last name>",
        may_change=True,
    )
    overwrite_output_dir: bool = option(False, "replace an earlier run's files in that folder", may_change=True)
    num_train_epochs: float = option(3.0, "passes over the training rows", unit="epochs", above=0)
    max_steps: int = option(-1, "optimizer steps; above 0 it replaces num_train_epochs", unit="steps", at_least=-1)
    seed: int = option(42, "seed of the order, the held-out rows and dropout", at_least=0)
    per_device_train_batch_size: int = option(1, "sequences of one micro-batch", unit="sequences", at_least=1)
    gradient_accumulation_steps: int | None = option(
        None, "micro-batches of one optimizer step", unit="micro-batches", at_least=1, shown="16"
    )
    global_batch_size: int | None = option(
        None, "sequences of one optimizer step; derives accumulation", unit="sequences", at_least=1, shown="derived"
    )
    resume_from_checkpoint: str | None = option(
        None, "checkpoint folder; bare: the newest good one of output_dir", bare=NEWEST, shown="off", may_change=True
    )
    allow_changes: bool = option(False, "resume although options or data have changed", may_change=True)

    # --- optimization
    optim: str = option(
        "adamw",
        "optimizer; adamw is torch's fused one, the others are bitsandbytes'",
        group="optimization",
        choices=("adamw", "adamw_8bit", "paged_adamw_8bit"),
        spellings={
            "adamw_torch": "adamw",
            "adamw_torch_fused": "adamw",
            "adamw_hf": "adamw",
            "adamw_bnb_8bit": "adamw_8bit",
            "paged_adamw_bnb_8bit": "paged_adamw_8bit",
        },
    )
    learning_rate: float = option(2e-5, "highest learning rate", unit="per step", at_least=0)
    lr_scheduler_type: str = option(
        "linear", "learning-rate schedule", choices=("linear", "cosine", "constant", "constant_with_warmup")
    )
    warmup_steps: float = option(0, "warmup; below 1 a fraction of all steps", unit="steps", at_least=0)
    weight_decay: float = option(0.0, "decoupled weight decay, not of biases and norms", at_least=0)
    max_grad_norm: float = option(1.0, "clip the global gradient norm here; 0 is off", at_least=0)
    adam_beta1: float = option(0.9, "decay of the first moment", at_least=0, below=1)
    adam_beta2: float = option(0.999, "decay of the second moment", at_least=0, below=1)
    adam_epsilon: float = option(1e-8, "added to the update's denominator", above=0)

    # --- precision and memory
    precision: str = option(
        "bf16-mixed",
        "fp32; fp32 weights under bf16 autocast; or bf16 weights",
        group="precision and memory",
        choices=("fp32", "bf16-mixed", "bf16-true"),
        spellings={"fp32-true": "fp32", "32": "fp32", "32-true": "fp32", "float32": "fp32", "bf16": "bf16-mixed"},
    )
    activation_checkpointing: str = option(
        "none",
        "recompute activations in backward: of no, all or every n-th decoder layer",
        choices=("none", "full", "every_<n>"),
        aliases=("gradient_checkpointing",),
        spellings={"true": "full", "false": "none"},
        bare="full",
    )

    # --- records
    logging_steps: int = option(
        10, "steps between log lines", group="records", unit="steps", at_least=1, may_change=True
    )
    eval_strategy: str = option(
        "epoch", "when to evaluate, beside before and after", choices=("no", "epoch", "steps"), may_change=True
    )
    eval_steps: int | None = option(
        None, "steps between evaluations", unit="steps", at_least=1, shown="logging_steps", may_change=True
    )
    save_strategy: str = option("epoch", "when to save", choices=("no", "epoch", "steps"), may_change=True)
    save_steps: int = option(500, "steps between checkpoints", unit="steps", at_least=1, may_change=True)
    save_total_limit: int | None = option(
        None, "checkpoints to keep, the newest ones", unit="checkpoints", at_least=1, shown="all", may_change=True
    )
    report_to: str = option(
        "none",
        "also log to tensorboard, wandb, or both with a comma",
        choices=("none", "tensorboard", "wandb", "tensorboard,wandb"),
        spellings={"wandb,tensorboard": "tensorboard,wandb", "all": "tensorboard,wandb"},
        may_change=True,
    )
    debug: bool = option(False, "show tracebacks", may_change=True)


def parse_config(argv: Sequence[str] | None = None) -> Config:
    """Read flags and, with `--config`, a YAML file; check them; fill in what follows from them.

    Args:
        argv: the command line without the program; `sys.argv[1:]` by default.

    Raises:
        OptionsError: naming every unknown, malformed or contradictory option at once.
    """
    problems: list[str] = []
    flags = read_flags(Config, sys.argv[1:] if argv is None else argv, problems)
    file = read_yaml(Config, str(flags.pop("config")), problems) if "config" in flags else {}
    given = file | flags
    # Without a model everything that is not given comes from the demo.
    base = {} if given.get("model") is not None else read_yaml(Config, str(DEMO_FOLDER / "demo.yaml"), problems)
    if "dataset" in given:
        base.pop("dataset_split", None)
    config = replace(Config(), **(base | given))
    problems += find_problems(config, given)
    if problems:
        raise OptionsError("\n       ".join(dict.fromkeys(problems)))
    return resolve(config)


# ---------------------------------------------------------------------------------------------- checking


def find_problems(config: Config, given: Mapping[str, Any]) -> list[str]:
    """Check options against each other and against the disk, before anything is loaded.

    Args:
        config: the options as read, not yet resolved.
        given: the options that the user set.

    Returns:
        One message per problem, each with its remedy; empty when the run can start.
    """
    problems = _output_dir_problems(config)
    if config.max_steps == 0:
        problems.append("max_steps 0 trains nothing: give a number above 0, or -1 to use num_train_epochs")
    batch, accumulation = config.per_device_train_batch_size, given.get("gradient_accumulation_steps")
    if config.global_batch_size is not None:
        if config.global_batch_size % batch:
            problems.append(
                f"global_batch_size {config.global_batch_size} is not a multiple of per_device_train_batch_size {batch}"
            )
        elif accumulation is not None and accumulation * batch != config.global_batch_size:
            problems.append(
                f"global_batch_size {config.global_batch_size} is not {batch} x {accumulation}: "
                "leave out gradient_accumulation_steps, or correct one of the two"
            )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        problems.append("this version trains on one device: start it with `python`, not with torchrun")
    return problems


def _output_dir_problems(config: Config) -> list[str]:
    output_dir = Path(_output_dir(config))
    if output_dir.exists() and not output_dir.is_dir():
        return [f"output_dir {output_dir} is a file: choose another --output_dir"]
    if config.model is not None and output_dir.resolve() == Path(config.model).resolve():
        return [f"output_dir {output_dir} is the model's own folder: choose another --output_dir"]
    resumes = config.resume_from_checkpoint is not None
    if resumes or config.overwrite_output_dir or not output_dir.is_dir() or not any(output_dir.iterdir()):
        return []
    return [
        f"output_dir {output_dir} is not empty: --resume_from_checkpoint continues its run, "
        "--overwrite_output_dir replaces it, --output_dir chooses another folder"
    ]


def _output_dir(config: Config) -> str:
    if config.output_dir is not None:
        return config.output_dir
    name = "demo" if config.model is None else Path(config.model).resolve().name
    return f"./full-ft-{name}"


def resolve(config: Config) -> Config:
    """Fill in the options that follow from others; an option that has a value keeps it.

    Args:
        config: checked options.
    """
    accumulation = config.gradient_accumulation_steps or 16
    if config.global_batch_size is not None:
        accumulation = config.global_batch_size // config.per_device_train_batch_size
    dataset, split = config.dataset, config.dataset_split or "train"
    if dataset is None:
        dataset = str(DEMO_FOLDER / "instructions.jsonl") if config.model is None else DEFAULT_DATASET
        if config.model is not None and config.dataset_split is None:
            split = DEFAULT_DATASET_SPLIT
    return replace(
        config,
        dataset=dataset,
        dataset_split=split,
        output_dir=_output_dir(config),
        gradient_accumulation_steps=accumulation,
        global_batch_size=accumulation * config.per_device_train_batch_size,
        eval_steps=config.eval_steps or config.logging_steps,
    )


def to_yaml(config: Config) -> str:
    """Write the options as a file that `--config` reads back."""
    import yaml

    values = {name: getattr(config, name) for name in by_name(Config)}
    return yaml.safe_dump({name: value for name, value in values.items() if value is not None}, sort_keys=False)


if __name__ == "__main__":
    print(options_table(Config))
