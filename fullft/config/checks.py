"""Checks of the options against each other and against the disk, before anything is loaded. They change nothing."""

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fullft.config.config import accumulation_of, output_dir_of, planned_place, ranks_of
from fullft.config.options import NEWEST, UNDECIDED, Options
from fullft.config.placement import Placement
from fullft.config.ranks import find_place
from fullft.config.sizes import parse_size


def find_problems(options: Options, given: Mapping[str, Any]) -> list[str]:
    """Check options against each other and against the disk, before anything is loaded.

    Args:
        options: as read, not yet resolved.
        given: the options that the user set.

    Returns:
        One message per problem, each with its remedy; empty when the run can start.
    """
    # A plan and a preview write nothing.
    problems = [] if options.plan or options.preview else _output_dir_problems(options)
    problems += _package_problems(options)
    problems += _offload_problems(options)
    problems += _best_problems(options)
    problems += _node_problems(options)
    if options.device_memory is not None:
        try:
            parse_size(options.device_memory)
        except ValueError as error:
            problems.append(f"device_memory: {error}")
    if options.plan and options.preview:
        problems.append("plan and preview are two questions: ask one at a time")
    if options.max_steps == 0:
        problems.append("max_steps 0 trains nothing: give a number above 0, or -1 to use num_train_epochs")
    if options.warmup_steps > 1 and options.warmup_steps != int(options.warmup_steps):
        problems.append(f"warmup_steps {options.warmup_steps:g} is neither whole nor below 1")
    problems += _batch_problems(options)
    return problems


def _batch_problems(options: Options) -> Iterator[str]:
    batch, accumulation = options.per_device_train_batch_size, options.gradient_accumulation_steps
    whole, ranks = options.global_batch_size, ranks_of(options)
    over_ranks = f" x {ranks} ranks" if ranks > 1 else ""
    if options.micro_batch_tokens and (batch is not None or accumulation is not None):
        name = "gradient_accumulation_steps" if batch is None else "per_device_train_batch_size"
        yield f"micro_batch_tokens deals a step by tokens, {name} by number: leave out one of the two"
    if whole is None:
        return
    if batch is not None and whole % batch:
        yield (
            f"global_batch_size {whole} is not a multiple of per_device_train_batch_size {batch}: change one of the two"
        )
    elif accumulation is not None and batch is not None and accumulation != accumulation_of(options):
        yield (
            f"global_batch_size {whole} is not {batch} x {accumulation}{over_ranks}: "
            "leave out gradient_accumulation_steps, or correct one of the two"
        )
    elif accumulation is not None and batch is None and whole % (accumulation * ranks):
        yield (
            f"global_batch_size {whole} is not a multiple of gradient_accumulation_steps {accumulation}{over_ranks}: "
            "change one of the two"
        )


def find_idle_flags(options: Options, flags: Mapping[str, Any]) -> list[str]:
    """Name flags that would do nothing, unless the strategy was chosen too: then nothing was forgotten.

    In a file they may stay: a run's own config.yaml holds every option.
    """
    idle = [
        f"--{flag} does nothing with {strategy} {getattr(options, strategy)}: add --{strategy} steps"
        for flag, strategy in (("eval_steps", "eval_strategy"), ("save_steps", "save_strategy"))
        if flag in flags and strategy not in flags and getattr(options, strategy) != "steps"
    ]
    idle += [
        f"--{flag} does nothing without {' or '.join(f'--{question}' for question in questions)}: add it"
        for flag, questions in (("json", ("plan", "preview")), ("gpu_hour_price", ("plan",)))
        if flags.get(flag) and not any(getattr(options, question) for question in questions)
    ]
    return [*idle, *_idle_rank_flags(options, flags)]


def _idle_rank_flags(options: Options, flags: Mapping[str, Any]) -> Iterator[str]:
    started = find_place().count
    if not options.plan and started > 1 and flags.get("gpus", started) != started:
        yield f"--gpus {flags['gpus']} does nothing where {started} ranks have been started: leave it out"
    if "shard_nodes" in flags and options.shard == "none":
        yield "--shard_nodes does nothing with shard none: leave it out"


def _offload_problems(options: Options) -> Iterator[str]:
    try:
        placement = Placement.parse(options.offload)
    except ValueError as error:
        yield f"offload: {error}"
        return
    if placement.gradients == "released":
        if accumulation_of(options) > 1:
            yield (
                "offload: gradients=released steps within every backward, so nothing accumulates: add "
                "--gradient_accumulation_steps 1, or keep them with gradients=host"
            )
        if options.max_grad_norm > 0:
            yield (
                "offload: gradients=released has stepped before the global norm is known: add --max_grad_norm 0, or "
                "keep them with gradients=host"
            )
    if placement.optimizer != "device" and options.optim == "paged_adamw_8bit":
        yield f"offload: {options.optim} pages its states itself: leave out optimizer={placement.optimizer}"
    if placement.streams_layers and options.activation_checkpointing not in (UNDECIDED, "full"):
        yield (
            f"offload: parameters={placement.parameters} drops each layer's weights after use, so that backward must "
            "recompute it: add --activation_checkpointing full"
        )
    if placement.streams_layers and (ranks := ranks_of(options)) > 1:
        yield (
            f"offload: parameters={placement.parameters} brings layers from one rank's {placement.parameters}, and "
            f"{ranks} ranks gather them from each other: leave it out; --shard full keeps 1/{ranks} of them on each"
        )


def _node_problems(options: Options) -> Iterator[str]:
    asked = options.shard_nodes
    place = planned_place(ranks_of(options)) if options.plan else find_place()
    if asked is None:
        return
    if place.count % place.local_count:
        yield f"shard_nodes {asked} needs as many ranks on every node: leave it out, or start them so"
    elif place.machines % asked:
        divisors = [str(number) for number in range(1, place.machines + 1) if place.machines % number == 0]
        nodes = f"{place.machines} node{'s' if place.machines > 1 else ''}"
        yield f"shard_nodes {asked} does not divide {nodes}: choose {' or '.join(divisors)}, or leave it out"


def _best_problems(options: Options) -> Iterator[str]:
    """Every checkpoint needs a held-out loss, or the best one may not be among them."""
    if not options.load_best_model_at_end:
        return
    if options.val_size == 0:
        yield "load_best_model_at_end needs held-out rows to tell which is best: add --val_size 0.05"
    evaluates, saves, every = options.eval_strategy, options.save_strategy, options.eval_steps or options.logging_steps
    if "no" in (evaluates, saves):
        yield (
            f"load_best_model_at_end needs checkpoints and evaluations; save_strategy is {saves}, eval_strategy "
            f"{evaluates}: add --save_strategy epoch --eval_strategy epoch"
        )
    elif saves != evaluates:
        remedy = f"steps --eval_steps {options.save_steps}" if saves == "steps" else saves
        yield (
            f"load_best_model_at_end evaluates whenever it saves; save_strategy is {saves}, eval_strategy {evaluates}: "
            f"add --eval_strategy {remedy}"
        )
    elif saves == "steps" and options.save_steps % every:
        yield (
            f"load_best_model_at_end evaluates whenever it saves; save_steps {options.save_steps} is not a multiple of "
            f"eval_steps {every}: add --eval_steps {options.save_steps}"
        )


def _package_problems(options: Options) -> list[str]:
    """Name packages that an option needs and that are not installed, without importing any."""
    needed = {name: f"report_to {options.report_to}" for name in options.report_to.split(",") if name != "none"}
    return [f"{option} needs {name}: pip install {name}" for name, option in needed.items() if not _is_installed(name)]


def _is_installed(package: str) -> bool:
    specification = importlib.util.find_spec(package)
    # A folder that merely has the name, such as the wandb/ that wandb leaves behind, has no origin.
    return specification is not None and specification.origin is not None


def _output_dir_problems(options: Options) -> list[str]:
    output_dir = output_dir_of(options)
    existing = next(folder for folder in (output_dir, *output_dir.absolute().parents) if os.path.lexists(folder))
    if not existing.is_dir():
        return [f"output_dir {output_dir}: {existing} is not a folder: choose another --output_dir"]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [f"output_dir {output_dir}: {existing} may not be written: choose another --output_dir"]
    return (
        _source_problems(options, output_dir.resolve())
        or _resume_problems(options, output_dir)
        or _content_problems(options, output_dir)
    )


def _source_problems(options: Options, output_dir: Path) -> list[str]:
    """Protect what is read: the model must not be replaced or deleted, and the run's files must not become rows."""
    if options.model is not None and os.path.isdir(options.model):
        model = Path(options.model).resolve()
        if model == output_dir:
            return [f"output_dir {output_dir} is the model's own folder: choose another --output_dir"]
        if model.parent == output_dir and re.fullmatch(r"checkpoint-\d+", model.name):
            return [
                f"the model {model} is a checkpoint in output_dir, which may be deleted: choose another --output_dir"
            ]
    for option in ("dataset", "eval_dataset"):
        name = getattr(options, option)
        if name is not None and os.path.isdir(name):
            folder = Path(name).resolve()
            if folder == output_dir or folder in output_dir.parents:
                return [
                    f"output_dir {output_dir} lies in the folder of {option}: its files would be read as rows next time"
                ]
    return []


def _resume_problems(options: Options, output_dir: Path) -> list[str]:
    checkpoint = options.resume_from_checkpoint
    if checkpoint in (None, NEWEST) or Path(str(checkpoint)).resolve().parent == output_dir.resolve():
        return []
    # A checkpoint from elsewhere would continue in the middle of another run's files.
    if not _has_content(output_dir):
        return []
    return [f"output_dir {output_dir} is not empty: a checkpoint from elsewhere needs an --output_dir of its own"]


def _content_problems(options: Options, output_dir: Path) -> list[str]:
    if options.resume_from_checkpoint is not None or options.overwrite_output_dir or not _has_content(output_dir):
        return []
    return [
        f"output_dir {output_dir} is not empty: --resume_from_checkpoint continues its run, "
        "--overwrite_output_dir replaces it, --output_dir chooses another folder"
    ]


def _has_content(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())
