"""Every option: its name, unit, default and limits. Flags, YAML keys, `--help` and README's table come from here.

Owns which options there are, how they are checked against each other, and what follows from them. Imports nothing
heavy. `python -m fullft.config.config` prints README's table.
"""

import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fullft.config.options import by_name, option, options_table, read_flags, read_yaml
from fullft.errors import OptionsError

DEMO_FOLDER = Path(__file__).parent.parent / "demo"
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
        metavar="ID|FOLDER",
        aliases=("model_name_or_path",),
        called=("base_model", "model_id", "model_path"),
        shown="the built-in demo",
    )
    trust_remote_code: bool = option(False, "run model code that comes with the weights")
    dataset: str | None = option(
        None,
        "hub id, or a .json .jsonl .csv .parquet .txt file or a folder of them",
        metavar="ID|PATH",
        aliases=("dataset_name",),
        called=("train_file", "dataset_path", "train_data", "dataset_name_or_path"),
        shown=DEFAULT_DATASET,
    )
    dataset_split: str | None = option(
        None,
        "which rows",
        metavar="SPLIT",
        called=("split", "max_train_samples", "max_samples"),
        shown=f"train; of the default dataset {DEFAULT_DATASET_SPLIT}",
    )
    dataset_text_field: str = option("text", "the column of plain text", metavar="COLUMN")
    columns: dict[str, str] = option(
        {}, "rename columns, as in output=answer; ours", metavar="OURS=YOURS ...", choices=COLUMNS, shown="as named"
    )
    max_length: int = option(
        512,
        "longest sequence",
        unit="tokens",
        called=("max_seq_length", "max_seq_len", "cutoff_len", "block_size"),
        at_least=2,
    )
    packing: bool = option(False, "fill sequences with several documents, each isolated from the others")
    train_on_prompt: bool = option(False, "count prompt tokens in the loss too")
    val_size: float = option(0.05, "rows held out for evaluation", unit="fraction of rows", at_least=0, below=1)

    # --- run
    output_dir: str | None = option(
        None,
        "folder for everything that the run writes",
        group="run",
        metavar="FOLDER",
        shown="./full-ft-<model's last name>",
        may_change=True,
    )
    overwrite_output_dir: bool = option(
        False, "replace an earlier run's files in that folder, and no others", called=("overwrite",), may_change=True
    )
    num_train_epochs: float = option(
        3.0, "passes over the training rows", unit="epochs", called=("epochs", "num_epochs"), above=0
    )
    max_steps: int = option(
        -1, "length of the run; above 0 it replaces num_train_epochs", unit="optimizer steps", at_least=-1
    )
    seed: int = option(42, "of the order, the held-out rows and dropout", at_least=0, below=2**32)
    per_device_train_batch_size: int = option(
        1,
        "size of a micro-batch",
        unit="sequences",
        called=("batch_size", "train_batch_size", "micro_batch_size", "per_device_batch_size"),
        at_least=1,
    )
    gradient_accumulation_steps: int | None = option(
        None,
        "length of an optimizer step",
        unit="micro-batches",
        called=("grad_accum", "accumulation_steps"),
        at_least=1,
        shown="16",
    )
    global_batch_size: int | None = option(
        None,
        "size of an optimizer step; given, it derives accumulation",
        unit="sequences",
        at_least=1,
        shown="micro-batch x accumulation",
    )
    resume_from_checkpoint: str | None = option(
        None,
        "continue a run; without a value from the newest good checkpoint",
        metavar="CHECKPOINT",
        called=("resume", "resume_from"),
        spellings={"true": NEWEST, "false": None},
        bare=NEWEST,
        shown="off",
        may_change=True,
    )
    allow_changes: bool = option(False, "resume although options or data have changed", may_change=True)

    # --- optimization
    optim: str = option(
        "adamw",
        "AdamW with fp32 moments, or with 8-bit ones",
        group="optimization",
        choices=("adamw", "adamw_8bit", "paged_adamw_8bit"),
        called=("optimizer",),
        spellings={
            "adamw_torch": "adamw",
            "adamw_torch_fused": "adamw",
            "adamw_hf": "adamw",
            "adamw_bnb_8bit": "adamw_8bit",
            "paged_adamw_bnb_8bit": "paged_adamw_8bit",
        },
    )
    learning_rate: float = option(2e-5, "the highest of the schedule", called=("lr",), at_least=0)
    lr_scheduler_type: str = option(
        "linear",
        "learning-rate schedule",
        choices=("linear", "cosine", "constant", "constant_with_warmup"),
        called=("lr_scheduler", "scheduler", "lr_schedule"),
    )
    warmup_steps: float = option(
        0.0,
        "learning-rate warmup; below 1 a fraction of all steps",
        unit="optimizer steps",
        called=("warmup_ratio", "warmup"),
        at_least=0,
    )
    weight_decay: float = option(0.0, "decoupled weight decay, not of biases and norms", at_least=0)
    max_grad_norm: float = option(
        1.0, "clip the global gradient norm here; 0 is off", called=("grad_clip", "gradient_clipping"), at_least=0
    )
    adam_beta1: float = option(0.9, "decay of the first moment", at_least=0, below=1)
    adam_beta2: float = option(0.999, "decay of the second moment", at_least=0, below=1)
    adam_epsilon: float = option(1e-8, "added to the update's denominator", above=0)

    # --- precision and memory
    precision: str = option(
        "bf16-true",
        "fp32 weights; fp32 weights under bf16 autocast; or bf16 weights",
        group="precision and memory",
        choices=("fp32", "bf16-mixed", "bf16-true"),
        called=("bf16", "fp16", "dtype", "torch_dtype", "mixed_precision", "tf32"),
        spellings={"fp32_true": "fp32", "32": "fp32", "32_true": "fp32", "float32": "fp32", "bf16": "bf16-mixed"},
    )
    activation_checkpointing: str = option(
        "auto",
        "what backward recomputes: nothing; all but matrix products and attention; whole decoder layers; every n-th "
        "of them; auto: as little as fits",
        choices=("none", "selective", "full", "every_<n>", "auto"),
        aliases=("gradient_checkpointing",),
        spellings={"true": "full", "false": "none"},
        bare="full",
        may_change=True,  # gradients are the same to the bit, if layers are not compiled
    )
    master_weights: str = option(
        "split",
        "what bf16 weights stand for, with precision bf16-true: fp32 numbers, exactly, in 16 more bits per weight; "
        "bf16 ones, rounded up or down at random; bf16 ones, rounded to the nearest",
        choices=("split", "stochastic", "none"),
    )
    offload: str = option(
        "auto",
        "keep optimizer, gradients or parameters on host or disk; gradients=released uses each up in backward",
        metavar="none|WHAT=WHERE ...",
        called=("cpu_offload", "offload_optimizer", "offload_param"),
        spellings={"true": "optimizer=host", "false": "none", "cpu": "optimizer=host"},
        several=True,
        may_change=True,  # the trajectory is the same to the bit, if layers are not compiled
    )
    compile: str = option(
        "auto",
        "compile the decoder layers; auto: if sequences are packed and the run is long enough to gain by it",
        choices=("auto", "true", "false"),
        called=("torch_compile",),
        spellings={"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false", "0": "false"},
        bare="true",
    )
    fit: str = option(
        "auto",
        "let the plan set what is left at auto, as the fastest choice that fits; off: run what was asked",
        choices=("auto", "off"),
        may_change=True,
    )
    plan: bool = option(False, "print where every byte would go, and exit", called=("dry_run",), may_change=True)
    json: bool = option(False, "print the plan as JSON", may_change=True)
    device_memory: str | None = option(
        None,
        "plan for a card of this size, as in 24GiB (2^30) or 24GB (10^9)",
        metavar="SIZE",
        called=("gpu_memory", "vram"),
        shown="this device's",
        may_change=True,
    )
    gpus: int | None = option(
        None, "show the plan for this many GPUs too", unit="GPUs", at_least=1, shown="1, 2, 4, 8", may_change=True
    )
    gpu_hour_price: float | None = option(
        None, "show the plan's cost", unit="any currency per GPU-hour", above=0, shown="none", may_change=True
    )

    # --- records
    logging_steps: int = option(
        10, "distance of log lines", group="records", unit="optimizer steps", at_least=1, may_change=True
    )
    eval_strategy: str = option(
        "epoch",
        "when to evaluate, beside before and after",
        choices=("no", "epoch", "steps"),
        called=("evaluation_strategy",),
        may_change=True,
    )
    eval_steps: int | None = option(
        None,
        "distance of evaluations, with eval_strategy steps",
        unit="optimizer steps",
        at_least=1,
        shown="logging_steps",
        may_change=True,
    )
    save_strategy: str = option(
        "epoch", "when to save a checkpoint, beside after", choices=("no", "epoch", "steps"), may_change=True
    )
    save_steps: int = option(
        500,
        "distance of checkpoints, with save_strategy steps",
        unit="optimizer steps",
        at_least=1,
        may_change=True,
    )
    save_total_limit: int | None = option(
        None, "keep only the newest ones", unit="checkpoints", at_least=1, shown="all", may_change=True
    )
    report_to: str = option(
        "none",
        "also log to a tracker",
        choices=("none", "tensorboard", "wandb", "tensorboard,wandb"),
        spellings={"wandb,tensorboard": "tensorboard,wandb", "all": "tensorboard,wandb"},
        may_change=True,
    )
    memory_snapshot: bool = option(
        False, "on CUDA, record the worst step's allocations for pytorch.org/memory_viz", may_change=True
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
    given = _beaten_by(flags, file) | flags
    # Without a model everything that is not given comes from the demo.
    base = {} if given.get("model") is not None else read_yaml(Config, str(DEMO_FOLDER / "demo.yaml"), problems)
    if "output_dir" in given:
        base.pop("overwrite_output_dir", None)  # the demo overwrites its own folder, never one that somebody names
    config = replace(Config(), **(base | given))
    problems += find_problems(config, given)
    problems += _idle_flags(config, flags)
    if problems:
        raise OptionsError("\n       ".join(dict.fromkeys(problems)))
    return resolve(config)


def _beaten_by(flags: Mapping[str, Any], file: Mapping[str, Any]) -> dict[str, Any]:
    """Drop from a file's values what flags beat under another name: the three options of the batch make one.

    A run's own config.yaml holds all three of them, and one flag shall be enough to change it.
    """
    micro, accumulation, whole = "per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size"
    beaten = set()
    if accumulation in flags and whole not in flags:
        beaten = {whole}
    elif whole in flags or (micro in flags and whole in file):
        beaten = {accumulation}
    return {name: value for name, value in file.items() if name not in beaten}


# ---------------------------------------------------------------------------------------------- checking


def find_problems(config: Config, given: Mapping[str, Any]) -> list[str]:
    """Check options against each other and against the disk, before anything is loaded.

    Args:
        config: the options as read, not yet resolved.
        given: the options that the user set.

    Returns:
        One message per problem, each with its remedy; empty when the run can start.
    """
    problems = [] if config.plan else _output_dir_problems(config)  # a plan writes nothing
    problems += _package_problems(config)
    problems += _offload_problems(config)
    if config.device_memory is not None:
        try:
            parse_size(config.device_memory)
        except ValueError as error:
            problems.append(f"device_memory: {error}")
    if config.max_steps == 0:
        problems.append("max_steps 0 trains nothing: give a number above 0, or -1 to use num_train_epochs")
    if config.warmup_steps > 1 and config.warmup_steps != int(config.warmup_steps):
        problems.append(f"warmup_steps {config.warmup_steps:g} is neither whole nor below 1")
    batch, accumulation = config.per_device_train_batch_size, given.get("gradient_accumulation_steps")
    if config.global_batch_size is not None:
        if config.global_batch_size % batch:
            problems.append(
                f"global_batch_size {config.global_batch_size} is not a multiple of per_device_train_batch_size "
                f"{batch}: change one of the two"
            )
        elif accumulation is not None and accumulation * batch != config.global_batch_size:
            problems.append(
                f"global_batch_size {config.global_batch_size} is not {batch} x {accumulation}: "
                "leave out gradient_accumulation_steps, or correct one of the two"
            )
    if os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1"):
        problems.append("this version trains on one device: start it with `python`, not with torchrun")
    return problems


def _idle_flags(config: Config, flags: Mapping[str, Any]) -> list[str]:
    """Name flags that would do nothing, unless the strategy was chosen too: then nothing was forgotten.

    In a file they may stay: a run's own config.yaml holds every option.
    """
    return [
        f"--{flag} does nothing with {strategy} {getattr(config, strategy)}: add --{strategy} steps"
        for flag, strategy in (("eval_steps", "eval_strategy"), ("save_steps", "save_strategy"))
        if flag in flags and strategy not in flags and getattr(config, strategy) != "steps"
    ] + [
        f"--{flag} does nothing without --plan: add it"
        for flag in ("json", "gpus", "gpu_hour_price")
        if flags.get(flag) and not config.plan
    ]


_SIZE_UNITS = {"": 2**30, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_SIZE_UNITS |= {"tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_size(text: str) -> int:
    """Read an amount of memory.

    Args:
        text: as in 24GiB (2^30), 24GB (10^9), 24G or 24 (both GiB).

    Returns:
        Bytes.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([kmgt]?(?:i?b)?)", text.strip().lower())
    if match is None or match[2] not in _SIZE_UNITS or not float(match[1]):
        raise ValueError(f"{text!r} is no amount of memory: write it as in 24GiB (2^30) or 24GB (10^9)")
    return round(float(match[1]) * _SIZE_UNITS[match[2]])


_TIERS = {
    "parameters": ("device", "host", "disk"),
    "gradients": ("device", "host", "disk", "released"),
    "optimizer": ("device", "host", "disk"),
}


def parse_offload(text: str) -> dict[str, str]:
    """Read what lives away from the device.

    Args:
        text: `none`, `auto` (undecided: nothing), or a list as in optimizer=host,gradients=disk.

    Returns:
        Where each thing named lives; those on the device are left out.

    Raises:
        ValueError: it is none of these.
    """
    placed: dict[str, str] = {}
    for word in text.split(",") if text not in ("none", "auto") else []:
        what, _, where = word.strip().lower().partition("=")
        if where not in _TIERS.get(what, ()):
            known = "; ".join(f"{name}={'|'.join(tiers)}" for name, tiers in _TIERS.items())
            raise ValueError(f"{word.strip()!r} is neither none nor one of {known}")
        if what in placed:
            raise ValueError(f"{what} is placed twice")
        placed[what] = where
    return {what: where for what, where in placed.items() if where != "device"}


def _offload_problems(config: Config) -> Iterator[str]:
    try:
        placed = parse_offload(config.offload)
    except ValueError as error:
        yield f"offload: {error}"
        return
    if placed.get("gradients") == "released":
        size = config.global_batch_size or 0
        accumulates = size > config.per_device_train_batch_size or (
            not size and (config.gradient_accumulation_steps or 16) > 1
        )
        if accumulates:
            yield (
                "offload: gradients=released steps within every backward, so nothing accumulates: add "
                "--gradient_accumulation_steps 1, or keep them with gradients=host"
            )
        if config.max_grad_norm > 0:
            yield (
                "offload: gradients=released has stepped before the global norm is known: add --max_grad_norm 0, or "
                "keep them with gradients=host"
            )
    if "optimizer" in placed and config.optim.startswith("paged"):
        yield f"offload: {config.optim} pages its states itself: leave out optimizer={placed['optimizer']}"
    if "parameters" in placed and config.activation_checkpointing not in ("auto", "full"):
        yield (
            f"offload: parameters={placed['parameters']} drops each layer's weights after use, so that backward must "
            "recompute it: add --activation_checkpointing full"
        )


def _package_problems(config: Config) -> list[str]:
    """Name packages that an option needs and that are not installed, without importing any."""
    needed = {name: f"report_to {config.report_to}" for name in config.report_to.split(",") if name != "none"}
    return [f"{option} needs {name}: pip install {name}" for name, option in needed.items() if not _is_installed(name)]


def _is_installed(package: str) -> bool:
    specification = importlib.util.find_spec(package)
    # A folder that merely has the name, such as the wandb/ that wandb leaves behind, has no origin.
    return specification is not None and specification.origin is not None


def _output_dir_problems(config: Config) -> list[str]:
    output_dir = Path(_output_dir(config))
    existing = next(folder for folder in (output_dir, *output_dir.absolute().parents) if os.path.lexists(folder))
    if not existing.is_dir():
        return [f"output_dir {output_dir}: {existing} is not a folder: choose another --output_dir"]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [f"output_dir {output_dir}: {existing} may not be written: choose another --output_dir"]
    return (
        _source_problems(config, output_dir.resolve())
        or _resume_problems(config, output_dir)
        or _content_problems(config, output_dir)
    )


def _source_problems(config: Config, output_dir: Path) -> list[str]:
    """Protect what is read: the model must not be replaced or deleted, and the run's files must not become rows."""
    if config.model is not None and os.path.isdir(config.model):
        model = Path(config.model).resolve()
        if model == output_dir:
            return [f"output_dir {output_dir} is the model's own folder: choose another --output_dir"]
        if model.parent == output_dir and re.fullmatch(r"checkpoint-\d+", model.name):
            return [
                f"the model {model} is a checkpoint in output_dir, which may be deleted: choose another --output_dir"
            ]
    if config.dataset is not None and os.path.isdir(os.path.expanduser(config.dataset)):
        dataset = Path(config.dataset).expanduser().resolve()
        if dataset == output_dir or dataset in output_dir.parents:
            return [f"output_dir {output_dir} lies in the dataset's folder: its files would be read as rows next time"]
    return []


def _resume_problems(config: Config, output_dir: Path) -> list[str]:
    checkpoint = config.resume_from_checkpoint
    if checkpoint in (None, NEWEST) or Path(str(checkpoint)).resolve().parent == output_dir.resolve():
        return []
    # A checkpoint from elsewhere would continue in the middle of another run's files.
    if not _has_content(output_dir):
        return []
    return [f"output_dir {output_dir} is not empty: a checkpoint from elsewhere needs an --output_dir of its own"]


def _content_problems(config: Config, output_dir: Path) -> list[str]:
    if config.resume_from_checkpoint is not None or config.overwrite_output_dir or not _has_content(output_dir):
        return []
    return [
        f"output_dir {output_dir} is not empty: --resume_from_checkpoint continues its run, "
        "--overwrite_output_dir replaces it, --output_dir chooses another folder"
    ]


def _has_content(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


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
    # Who turns the fitting off leaves nothing to decide; and weights that leave take the activations with them.
    checkpointing, offload, compiles = config.activation_checkpointing, config.offload, config.compile
    if checkpointing == "auto" and "parameters" in parse_offload(offload):
        checkpointing = "full"
    if config.fit == "off":
        checkpointing = "none" if checkpointing == "auto" else checkpointing
        offload = "none" if offload == "auto" else offload
        compiles = "false" if compiles == "auto" else compiles
    return replace(
        config,
        model=config.model and os.path.expanduser(config.model),
        activation_checkpointing=checkpointing,
        offload=offload,
        compile=compiles,
        dataset=dataset,
        dataset_split=split,
        output_dir=_output_dir(config),
        gradient_accumulation_steps=accumulation,
        global_batch_size=accumulation * config.per_device_train_batch_size,
        eval_steps=config.eval_steps or config.logging_steps,
    )


# Asked of one run only: in its config.yaml they would ask every later run, too, to replace what it finds.
_ONE_SHOT = ("overwrite_output_dir", "resume_from_checkpoint", "allow_changes", "plan", "json", "debug")


def to_yaml(config: Config) -> str:
    """Write the options as a file that `--config` reads back; not those that were asked of this run only."""
    import yaml

    values = {name: getattr(config, name) for name in by_name(Config) if name not in _ONE_SHOT}
    return yaml.safe_dump({name: value for name, value in values.items() if value is not None}, sort_keys=False)


if __name__ == "__main__":
    print(options_table(Config))
