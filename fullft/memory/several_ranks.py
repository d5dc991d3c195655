"""The stages of sharding side by side: what a rank needs in each, what it sends, and how long a step takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fullft.config.config import Config
from fullft.memory.choose import Plans, fits, step_seconds
from fullft.memory.machine import Device
from fullft.memory.plan import Batch
from fullft.memory.speeds import Speeds
from fullft.memory.stages import possible_stages
from fullft.memory.units import Unit

NAMES = {"none": "DDP", "optimizer": "ZeRO-1", "gradients": "ZeRO-2", "full": "ZeRO-3"}


@dataclass(frozen=True)
class Stage:
    """A run in one stage of sharding, all else being equal.

    Attributes:
        shard: the option's word.
        planned: from `plan_step`; None where the model cannot be trained so.
        seconds: of a step, estimated.
    """

    shard: str
    planned: Mapping[str, Any] | None = None
    seconds: float = 0.0


def plan_stages(config: Config, plans: Plans, batch: Batch, speeds: Speeds) -> list[Stage]:
    """Plan a run in every stage, from the one that keeps most on each rank to the one that keeps least.

    Args:
        config: nothing is left to the plan.
        plans: of the model.
        batch: the largest micro-batches.
        speeds: of the machine.
    """
    possible = possible_stages(config, plans.model_config)
    facts, stages = plans.facts(batch.length), []
    for shard in NAMES:
        other = replace(config, shard=shard)
        if shard == config.shard or shard in possible:
            stages.append(Stage(shard, plans.of(other, batch), step_seconds(other, facts, batch, speeds)))
        else:
            stages.append(Stage(shard))
    return stages


def describe_stages(config: Config, stages: Sequence[Stage], device: Device, speeds: Speeds, unit: Unit) -> str:
    """Write the stages as a table.

    Args:
        config: nothing is left to the plan.
        stages: from `plan_stages`.
        device: of each rank.
        speeds: that the seconds were estimated with.
        unit: of the text.
    """
    place = config.place
    machines = f" on {place.machines} machines" if place.machines > 1 else ""
    copies = f", {config.group.copies} copies" if 1 < config.group.copies < config.gpus else ""
    head = f"--shard over {config.gpus} ranks{machines}{copies}"
    lines = [f"{head:46}{'peak':>11}{'gathers':>12}{'reduces':>12}{'a step':>10}   fits"]
    for stage in stages:
        name = f"{'>' if stage.shard == config.shard else ' '} {stage.shard} ({NAMES[stage.shard]})"
        if stage.planned is None:
            lines.append(f"{name:46}{'not for this model and optimizer':>34}")
            continue
        sent = sent_of(stage.planned)
        moved = "".join(f"{size / unit.decimal_size:>9,.1f} {unit.decimal}" for size in sent.values())
        peak = f"{unit.number(stage.planned['peak_bytes'])} {unit.name}"
        verdict = "yes" if fits(stage.planned, device) else "no"
        lines.append(f"{name:46}{peak:>11}{moved}{_time(stage.seconds):>10}   {verdict}")
    return "\n".join([*lines, _describe_speeds(config, speeds)])


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:,.0f} s" if seconds >= 100 else f"{seconds:.3g} s"


def _describe_speeds(config: Config, speeds: Speeds) -> str:
    links = f"{speeds.interconnect / 1e9:,.3g} GB/s between ranks"
    if config.place.machines > 1:
        links += f" of a machine, {speeds.network / 1e9:,.3g} GB/s per rank to others"
    origin = "assumed" if config.device_memory is not None else "the links assumed"
    return f"  A step at {speeds.flops / 1e12:,.3g} TFLOP/s; {links} ({origin})"


def stages_object(config: Config, stages: Sequence[Stage]) -> dict[str, Any]:
    """Return each stage's peak as `--plan --json` shows it; null where the model cannot be trained so.

    Args:
        config: nothing is left to the plan.
        stages: from `plan_stages`.
    """
    peaks = {stage.shard: stage.planned and stage.planned["peak_bytes"] for stage in stages}
    numbered = {NAMES[shard].replace("ZeRO-", "stage_"): peak for shard, peak in peaks.items() if shard != "none"}
    return {"gpus": config.gpus} | numbered


def sent_of(planned: Mapping[str, Any]) -> dict[str, int]:
    """Return the bytes that a rank sends per step: of weights that are gathered, and of gradients that are summed.

    Args:
        planned: from `plan_step`.
    """
    sent = planned["sent"]
    return {"gathered": sent["all_gather"], "reduced": sent["reduce_scatter"] + sent["all_reduce"]}
