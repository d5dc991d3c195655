"""A run's memory: planned before its weights are loaded, measured before its first step, both recorded together."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from fullft.config.config import Config
from fullft.config.steps import Steps
from fullft.data.load import Data
from fullft.errors import FullftError, MemoryExhaustedError, general_advice
from fullft.hardware import process_figures
from fullft.memory.choose import Plans, choose, dealing_of, dealt_by, fits
from fullft.memory.collectives import sent_in_step
from fullft.memory.dealings import Dealings, dealings_of_run
from fullft.memory.levers import find_levers
from fullft.memory.machine import Device, find_device, least_of
from fullft.memory.picture import plot_memory
from fullft.memory.plan import Batch
from fullft.memory.profile import Profile
from fullft.memory.screen import compare
from fullft.memory.snapshot import publish_recording, recording
from fullft.memory.speeds import Speeds, measure_ring, measure_speeds
from fullft.memory.units import GIB, Unit, unit_for
from fullft.memory.worst_step import take_worst_step
from fullft.model.loss import LossSum
from fullft.optim.adamw import AdamW
from fullft.optim.adamw_8bit import require_kernel
from fullft.ranks import by_each_rank, by_first_rank, is_first
from fullft.saving.checkpoint import Checkpoint
from fullft.saving.files import write_text
from fullft.transforms.compilation import choose_compilation


@dataclass(frozen=True)
class RunPlan:
    """What a run will need.

    Attributes:
        config: the options, with nothing left open.
        figures: those of `memory.json`, in bytes; None where the model cannot be run on fake tensors.
        device: what it has to fit on.
        description: lines that say what was chosen, and why.
        advice: says what to do if memory runs out after all.
    """

    config: Config
    figures: dict[str, Any] | None
    device: Device
    description: str
    advice: Callable[[], str] = general_advice


def plan_run(
    config: Config,
    model_config: PreTrainedConfig,
    data: Data,
    device: torch.device,
    checkpoint: Checkpoint | None = None,
) -> RunPlan:
    """Plan a training run before its weights are loaded, and decide what was left open.

    Every rank calls it. The first one decides for all.

    Args:
        config: resolved options.
        model_config: of the model to train.
        data: holds the largest micro-batches.
        device: where it will train.
        checkpoint: that the run resumes.

    Raises:
        MemoryExhaustedError: with `--fit auto`, when no choice fits.
    """
    if config.has_8bit_moments:
        require_kernel(device)  # before weights are loaded
    batch, plans = _largest_batch(config, data), Plans(model_config)
    saved = {} if checkpoint is None else checkpoint.state["options"]
    # What fits on the rank with the least of everything fits on all.
    there = least_of(by_each_rank(lambda: find_device(config, device)))
    ring = measure_ring(config, device) if config.gpus > 1 and config.undecided & {"shard", "offload"} else 0.0

    def decide() -> _Decision:
        dealings = dealings_of_run(config, model_config, data.train, saved)
        num_tokens = _num_tokens(config, data)
        timed = batch
        if dealings.ways:
            timed = replace(batch, sequences=max(1, dealings.ways[0].tokens // batch.length))
        speeds = partial(measure_speeds, config, plans.model_config, timed, device, ring)
        return _decide(config, plans, batch, there, device, num_tokens, speeds, dealings, saved)

    decision = by_first_rank(decide)
    config = replace(config, **decision.changes)
    figures = decision.figures
    if figures is None:
        return RunPlan(config, None, there, decision.description)

    def advice() -> str:
        unit = unit_for(figures["peak_bytes"])
        largest = sorted(figures["at_peak"].items(), key=lambda item: -item[1])[:4]
        parts = ", ".join(f"{name.replace('_', ' ')} {unit.number(size)}" for name, size in largest)
        return (
            f"the plan was {unit.amount(figures['peak_bytes'])} ({parts}); saved checkpoints are intact; cheapest "
            f"remedies: {_remedies(config, plans, batch, there, unit)}"
        )

    return RunPlan(config, figures, there, decision.description, advice)


@dataclass(frozen=True)
class _Decision:
    """What the first rank has decided for all, as it can be sent.

    Attributes:
        changes: options that were left open.
        figures: of the plan; None where the model cannot be planned.
        description: lines that say what was chosen, and why.
    """

    changes: dict[str, Any]
    figures: dict[str, Any] | None
    description: str


def _decide(
    asked: Config,
    plans: Plans,
    batch: Batch,
    there: Device,
    device: torch.device,
    num_tokens: float,
    speeds: Callable[[], Speeds],
    dealings: Dealings,
    saved: Mapping[str, Any],
) -> _Decision:
    try:
        work = num_tokens * plans.facts(batch.length).flops_per_token
        config, compilation = choose_compilation(dealings.config, work, device)
        config = _rounding_as_before(config, saved)
        config, choice = choose(config, plans, batch, there, speeds, dealings.ways)
        figures = plans.of(config, batch)
    except FullftError:
        raise
    except Exception as error:  # code that comes with a model may need values, which fake tensors lack
        line = f"warning: the memory of this model cannot be planned ({type(error).__name__}: {str(error)[:150]})"
        least = {"shard": "full", "micro_batch_tokens": 0}
        changes = {name: least[name] for name in least if name in asked.undecided}
        changes["isolates_documents"] = dealings.config.isolates_documents
        return _Decision(changes, None, "\n".join(filter(None, (line, dealings.note))))
    unit = unit_for(figures["peak_bytes"])
    if config.must_fit and not fits(figures, there):
        raise MemoryExhaustedError(
            f"this run needs {_needs(figures)}, {there.name} has {_has(there, unit)} free\n"
            f"cheapest remedies: {_remedies(config, plans, batch, there, unit)}; --plan shows where every byte goes, "
            "--fit off runs anyway"
        )
    lines = (
        f"Plan: {unit.amount(figures['peak_bytes'])} at the peak{_of_each(config)}; {choice}",
        dealings.note,
        compilation,
    )
    changes = {name: getattr(config, name) for name in ("isolates_documents", *asked.undecided)}
    if (dealing := dealing_of(config)) is not None:
        changes |= dealt_by(dealing)
    return _Decision(changes, figures, "\n".join(filter(None, lines)))


def _rounding_as_before(config: Config, saved: Mapping[str, Any]) -> Config:
    """Keep what the resumed run chose, where another choice may round otherwise.

    Graphs that recompute more may; stages of sharding add up gradients over ranks and micro-batches in other orders.
    """
    kept = {"activation_checkpointing", "offload"} if config.compiles else set()
    kept |= {"shard"} if saved.get("gpus") == config.gpus else set()
    return replace(config, **{name: saved[name] for name in kept & config.undecided & saved.keys()})


def _largest_batch(config: Config, data: Data) -> Batch:
    """Return the shape of the largest micro-batches that are not joined."""
    held_out = 0 if data.evaluation is None else sum(data.evaluation.lengths)
    whole = {"all_tokens": sum(data.train.lengths), "all_evaluation_tokens": held_out}
    by_number = data.dealt(replace(config, micro_batch_tokens=0, isolates_documents=False))
    return replace(Batch.of(*by_number.largest(accumulation=2)), **whole)


def _num_tokens(config: Config, data: Data) -> float:
    """Return the tokens of all steps."""
    train = data.train
    return Steps(config, train.steps_per_epoch).total * train.sequences_per_step * train.mean_length


def _needs(figures: dict[str, Any]) -> str:
    unit = unit_for(figures["peak_bytes"])
    elsewhere = [
        f", {unit.amount(figures[name])} {where}"
        for name, where in (("host_bytes", "of host memory"), ("disk_bytes", "of disk"))
        if figures[name]
    ]
    margin = f" and a margin of {unit.amount(figures['margin_bytes'])}" if figures["margin_bytes"] else ""
    return f"{unit.amount(figures['peak_bytes'])} at its peak{margin}" + "".join(elsewhere)


def _of_each(config: Config) -> str:
    return f" of each of {config.gpus} ranks" if config.gpus > 1 else ""


def _has(there: Device, unit: Unit) -> str:
    host = "" if there.is_host else f", {GIB.amount(there.host_bytes)} of host memory"
    return f"{unit.amount(there.memory_bytes)}{host}, {GIB.amount(there.disk_bytes)} of disk"


def _remedies(config: Config, plans: Plans, batch: Batch, there: Device, unit: Unit) -> str:
    levers = find_levers(config, plans, batch, there)[:3]
    return "; ".join(f"{lever.flags} (saves {unit.amount(lever.saved_bytes)})" for lever in levers) or "a smaller model"


def measure_run(
    plan: RunPlan,
    model: PreTrainedModel,
    loss_sum: LossSum,
    optimizer: AdamW,
    data: Data,
    autocast: torch.autocast,
) -> Profile:
    """Take the run's worst step under the tracker: a run that would be out of memory in hour three fails now.

    Every rank takes it, with micro-batches of the same shapes.

    Args:
        plan: of this run.
        model: in training mode, on its device.
        loss_sum: of the model.
        optimizer: has taken no step.
        data: holds the largest micro-batches.
        autocast: the context that training computes in.
    """
    config = plan.config
    micro_batches, evaluation = data.largest(config.gradient_accumulation_steps)
    with recording(model.device, config.output_dir if config.memory_snapshot and is_first() else None):
        return take_worst_step(model, loss_sum, optimizer, micro_batches, evaluation, autocast, config.max_grad_norm)


def record_memory(plan: RunPlan, measured: Profile, device: torch.device) -> str:
    """Write `memory.json` and `memory.png`; called before the first step, and again at the end.

    Every rank calls it. The first one writes what it has measured, what it sends in a step, and the peaks of all.

    Args:
        plan: of this run.
        measured: its worst step.
        device: where it runs.

    Returns:
        Planned, measured and their difference per component, and the process's own peaks, as lines.
    """
    figures, process = measured.to_dict(), process_figures(device)
    planned = plan.figures and {name: value for name, value in plan.figures.items() if name in figures}
    record: dict[str, Any] = {"planned": planned, "measured": figures, "process": process}
    if plan.config.gpus > 1:
        record["ranks"] = by_each_rank(lambda: figures["peak_bytes"])
        sent = sent_in_step(measured.sent, plan.config.gradient_accumulation_steps)
        record["sent"] = {"planned": plan.figures and plan.figures["sent"], "measured": asdict(sent)}

    def write() -> None:
        folder = plan.config.output_dir
        publish_recording(folder)
        write_text(folder / "memory.json", json.dumps(record, indent=1))
        plot_memory(measured, folder / "memory.png", folder.name, plan.device.memory_bytes)

    by_first_rank(write)
    peaks = ", ".join(
        f"{name.removesuffix('_bytes').replace('_', ' ')} {GIB.number(size)}" for name, size in process.items()
    )
    return f"{compare(plan.figures or figures, figures)}\nThe whole process: {peaks} GiB."
