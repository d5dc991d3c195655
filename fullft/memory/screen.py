"""The plan as people and programs read it: tables, JSON, verdicts per card, planned next to measured.

Bytes are integers until they are printed here. GiB is 2^30, GB is 10^9.
"""

import atexit
import functools
import gc
import json
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch

from fullft.config.config import Config, to_words
from fullft.config.numerics import Format
from fullft.errors import FullftError, ModelError
from fullft.hardware import pick_device
from fullft.memory.choose import Plans, choose, fits
from fullft.memory.dealings import dealings_of_plan
from fullft.memory.estimates import GPUS, MFU, ROWS, estimate_adapters, estimate_work
from fullft.memory.facts import Facts
from fullft.memory.levers import ALL, Lever, find_levers
from fullft.memory.machine import Device, cards, find_device, margin_bytes
from fullft.memory.plan import Batch, planned_device_type
from fullft.memory.profile import COMPONENTS
from fullft.memory.several_ranks import describe_stages, plan_stages, sent_of, stages_object
from fullft.memory.speeds import Speeds, measure_speeds
from fullft.memory.traffic import Traffic, estimate_traffic
from fullft.memory.units import Unit, unit_for
from fullft.model.checks import check_positions
from fullft.model.source import find_config
from fullft.transforms.compilation import choose_compilation

_WIDTH = 100  # of paragraphs


def show_plan(config: Config) -> None:
    """Print where every byte of a run would go, without loading a weight.

    Args:
        config: resolved options; with `json` the contract's object is all that is printed.

    Raises:
        ModelError: the config cannot be found, or describes nothing that can be trained.
        OptionsError: sequences are longer than the model has positions.
    """
    atexit.register(gc.freeze)  # the process ends with this, and saves 0.7 s of looking at every object
    plans = Plans(find_config(config))
    batch = largest_batch(config, plans)
    here = pick_device()
    device = find_device(config, here)
    try:
        dealings = dealings_of_plan(config, plans.model_config)
        config = dealings.config
        facts = plans.facts(batch.length)
        work = estimate_work(config, facts, batch).training_flops
        config, compilation = choose_compilation(config, work, torch.device(planned_device_type(config)))
        compilation += " (with the rows assumed below)" if compilation and config.max_steps <= 0 else ""
        speeds = functools.cache(functools.partial(measure_speeds, config, plans.model_config, batch, here))
        config, chosen = choose(config, plans, batch, device, speeds, dealings.ways)
        if config.json:
            figures = plan_object(config, plans.of(config, batch), facts, device)
            print(json.dumps(figures | _asked_for(config, plans, batch, speeds), indent=1))
        else:
            lines = (f"Chosen: {chosen}.", dealings.note, compilation)
            print("\n\n".join(describe_plan(config, plans, batch, device, speeds, lines)))
    except FullftError:
        raise
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelError(
            f"{config.model or 'the demo'} cannot be planned, its model cannot be built or run ({text[:300]})"
        ) from error


def largest_batch(config: Config, plans: Plans) -> Batch:
    """Return the micro-batches of a run whose longest rows are as long as allowed.

    Raises:
        OptionsError: sequences are longer than the model has positions.
    """
    check_positions(plans.model_config, config.max_length)
    return Batch(config.per_device_train_batch_size, config.max_length, config.max_length if config.evaluates else 0)


def plan_object(config: Config, planned: Mapping[str, Any], facts: Facts, device: Device) -> dict[str, Any]:
    """Return what `--plan --json` prints: the figures of `memory.json`, and what they belong to.

    Args:
        config: nothing is left to the plan.
        planned: from `plan_step`.
        facts: of the model.
        device: the one at hand; the usual cards follow it.
    """
    verdicts = [
        {"device": each.name, "memory_bytes": each.memory_bytes, "fits": fits(planned, each)}
        for each in (device, *cards())
    ]
    moved = asdict(sum(estimate_traffic(config, facts), Traffic())) if config.placement.offloaded else {}
    moved |= sent_of(planned) if config.gpus > 1 else {}
    traffic = {"traffic_per_step": moved} if moved else {}
    head = {"model": config.model or "the built-in demo", "num_parameters": planned["num_parameters"]}
    figures = {name: value for name, value in planned.items() if name != "sent"}
    return head | figures | {"options": to_words(config), "verdicts": verdicts} | traffic


def _asked_for(config: Config, plans: Plans, batch: Batch, speeds: Callable[[], Speeds]) -> dict[str, Any]:
    """Add to the contract's object what `--gpus` and `--gpu_hour_price` ask for."""
    asked: dict[str, Any] = {}
    if config.gpus > 1:
        asked["zero_bytes_per_gpu"] = stages_object(config, plan_stages(config, plans, batch, speeds()))
    if config.gpu_hour_price is not None:
        hours = _gpu_hours(config, plans, batch)
        asked["gpu_hours"] = hours
        asked["cost"] = hours and {name: spent * config.gpu_hour_price for name, spent in hours.items()}
    return asked


def _gpu_hours(config: Config, plans: Plans, batch: Batch) -> dict[str, float] | None:
    """Estimate the run's GPU-hours; None in fp32, where GPUs differ too much."""
    if config.numerics.computation is Format.FP32:
        return None
    work = estimate_work(config, plans.facts(batch.length), batch)
    return {name: work.hours(peak) for name, peak in GPUS.items()}


# ---------------------------------------------------------------------------------------------- the screen


def describe_plan(
    config: Config, plans: Plans, batch: Batch, device: Device, speeds: Callable[[], Speeds], chosen: Iterable[str]
) -> list[str]:
    """Write the screen that `--plan` shows, part by part.

    Args:
        config: nothing is left to the plan.
        plans: of the model.
        batch: the largest micro-batches.
        device: the one at hand.
        speeds: measures the machine.
        chosen: lines that say what was chosen, and why; empty ones are left out.
    """
    planned = plans.of(config, batch)
    unit = unit_for(planned["peak_bytes"])
    levers = find_levers(config, plans, batch, device)
    return [
        _assumptions(config, planned, batch, chosen, unit),
        _components(config, plans, batch, unit),
        _verdicts(config, planned, device, levers, unit),
        *([_levers(levers, unit)] if levers else []),
        *([_stages(config, plans, batch, device, speeds(), unit)] if config.gpus > 1 else []),
        "\n".join([_time(config, plans, batch), *_more(config, plans, batch)]),
    ]


def _assumptions(config: Config, planned: Mapping[str, Any], batch: Batch, chosen: Iterable[str], unit: Unit) -> str:
    dealt, count, rows = f"{batch.sequences} x {batch.length}", str(config.gradient_accumulation_steps), ""
    if config.micro_batch_tokens:
        dealt, rows = f"at most {config.micro_batch_tokens:,}", f"; rows of {batch.length}"
        count = "one" if count == "1" else f"at most {count}"
    on_each = f" on each of {config.gpus} ranks" if config.gpus > 1 else ""
    accumulated = f"{count} per step{on_each}{'; packed' * config.packing}{rows}"
    masters = f" with master weights {config.master_weights}" if config.numerics.weights is Format.BF16 else ""
    paragraphs = (
        f"Full fine-tuning of {config.model or 'the built-in demo'}: all {planned['num_parameters']:,} parameters",
        f"Assumed: micro-batches of {dealt} tokens, {accumulated}; "
        f"{config.precision}{masters}, {config.optim}. {unit.legend()}.",
        *chosen,
    )
    return "\n".join(textwrap.fill(each, _WIDTH, subsequent_indent="  ") for each in paragraphs if each)


def _components(config: Config, plans: Plans, batch: Batch, unit: Unit) -> str:
    planned = plans.of(config, batch)
    lora, qlora = estimate_adapters(config, plans, batch)
    facts, count = plans.facts(batch.length), planned["num_parameters"]

    def amounts(size: int) -> str:
        decimal = f"{size / unit.decimal_size:>10,.2f} {unit.decimal}"
        return f"{unit.number(size):>9} {unit.name}{decimal}{size / count:>9.2f}"

    ours, theirs = "- full fine-tuning, predicted -", "- rank 8, estimated -"
    if config.gpus > 1:
        ours, theirs = "- full fine-tuning, predicted per rank -", "- on one GPU, estimated -"
    lines = [
        f"{'':23}{ours.center(43, '-')}  {theirs.center(23, '-')}",
        f"{'component':18}{'own maximum':>13}{'at the peak':>13}{'':>13}{'B/param':>9}  {'LoRA':>11}{'QLoRA':>12}",
    ]
    for name in COMPONENTS:
        own, size = planned["components"][name], planned["at_peak"][name]
        lines.append(
            f"{_words(name):18}{unit.number(own):>9} {unit.name}{amounts(size)}"
            f"  {unit.number(lora[name]):>7} {unit.name}{unit.number(qlora[name]):>8} {unit.name}"
        )
    peak = planned["peak_bytes"]
    lines.append(
        f"{'all, in ' + _words(planned['peak_phase']):31}{amounts(peak)}"
        f"  {unit.number(sum(lora.values())):>7} {unit.name}{unit.number(sum(qlora.values())):>8} {unit.name}"
    )
    if planned["margin_bytes"]:
        lines.append(f"{'margin: workspaces, fragments':31}{amounts(planned['margin_bytes'])}")
    for name, where in (("host_bytes", "kept on the host besides"), ("disk_bytes", "kept on disk besides")):
        if planned[name]:
            lines.append(f"{where:31}{amounts(planned[name])}")
    lines.append(f"{'trained':18}{count:>39,}{'':9}  {facts.lora_parameters:>11,}{facts.lora_parameters:>12,}")
    phases = ", ".join(f"{_words(phase)} {unit.number(size)}" for phase, size in planned["phases"].items())
    lines.append(f"Largest per phase: {phases} {unit.name}.")
    if config.numerics.autocast:
        lines.append("Temporaries: mostly autocast's bf16 copies of the weights, which --precision bf16-true spares.")
    return "\n".join(lines)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _verdicts(config: Config, planned: Mapping[str, Any], device: Device, levers: list[Lever], unit: Unit) -> str:
    peak = planned["peak_bytes"]
    margin = margin_bytes(peak)
    each_rank = " per rank" * (config.gpus > 1)
    lines = [f"Fits {unit.amount(peak)}{each_rank}, on a card with a margin of {unit.amount(margin)}?"]
    others = [card for card in cards() if card.memory_bytes != device.memory_bytes]  # it would stand there twice
    for each in (device, *others):
        spare = each.memory_bytes - peak - (0 if each.is_host else margin)
        if spare >= 0 and not fits(planned, each):
            verdict = "no   the host or the disk has too little"
        elif spare >= 0:
            verdict = f"yes  {unit.number(spare):>7} {unit.name} to spare"
        else:
            help_ = next((lever.flags for lever in levers if _has_room(lever.peak_bytes, each)), None)
            if help_ is not None:
                is_long = help_.startswith("--offload")
                help_ = "with all the levers" if help_ == ALL else "with more offloaded" if is_long else f"with {help_}"
            verdict = f"no   {unit.number(-spare):>7} {unit.name} short    {help_ or ''}".rstrip()
        lines.append(f"  {each.name[:20]:20}{unit.number(each.memory_bytes):>8} {unit.name}  {verdict}")
    return "\n".join(lines)


def _has_room(peak: int, device: Device) -> bool:
    return peak + (0 if device.is_host else margin_bytes(peak)) <= device.memory_bytes


def _levers(levers: list[Lever], unit: Unit) -> str:
    lines = [f"{'Levers, cheapest in time first':36}{'saves':>11}{'then needs':>13}   {'time':12}but"]
    for lever in levers:
        lines.append(
            f"  {lever.flags:34}{unit.number(lever.saved_bytes):>7} {unit.name}{unit.number(lever.peak_bytes):>9} "
            f"{unit.name}   {lever.time:12}{lever.price}".rstrip()
        )
    return "\n".join(lines)


def _stages(config: Config, plans: Plans, batch: Batch, device: Device, speeds: Speeds, unit: Unit) -> str:
    return describe_stages(config, plan_stages(config, plans, batch, speeds), device, speeds, unit)


def _time(config: Config, plans: Plans, batch: Batch) -> str:
    work = estimate_work(config, plans.facts(batch.length), batch)
    of_all = "" if config.max_steps > 0 else f" ({config.num_train_epochs:g} epochs of {ROWS} assumed)"
    line = f"Time, estimated: {work.rows:,} rows{of_all} of at most {batch.length} tokens, {work.flops:.1e} FLOP"
    if (hours := _gpu_hours(config, plans, batch)) is None:
        return f"{line}\n  GPU-hours are given for bf16 alone: GPUs differ too much in fp32"
    shown = ", ".join(
        f"{name} {spent:.2g}" + (f" (cost {spent * config.gpu_hour_price:.2f})" if config.gpu_hour_price else "")
        for name, spent in hours.items()
    )
    note = ", with recomputation" if work.flops > work.training_flops else ""
    note += ", offloading aside" if config.placement.offloaded else ""
    note += ", communication aside" if config.gpus > 1 else ""
    hours_line = textwrap.fill(f"GPU-hours at {MFU:.0%} of peak{note}: {shown}", _WIDTH - 2, subsequent_indent="  ")
    return f"{line}\n{textwrap.indent(hours_line, '  ')}"


def _more(config: Config, plans: Plans, batch: Batch) -> Iterator[str]:
    if config.placement.offloaded:
        yield _traffic(config, plans, batch)
    if config.gpus == 1:
        yield "Several GPUs: --gpus N plans for N of them, in every stage of sharding"


def _traffic(config: Config, plans: Plans, batch: Batch) -> str:
    moved = sum(estimate_traffic(config, plans.facts(batch.length)), Traffic())
    link = f"{moved.to_device / 1e9:,.1f} GB to the device and {moved.from_device / 1e9:,.1f} GB from it"
    disk = f"{moved.disk_read / 1e9:,.1f} GB read from disk, {moved.disk_write / 1e9:,.1f} GB written"
    return f"Moved per step: {link}" + (f"; {disk}" if moved.disk_write else "")


# ---------------------------------------------------------------------------------------------- after a run


def compare(planned: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    """Write planned and measured bytes side by side, per component at the peak.

    Args:
        planned: the figures of `memory.json`, from the plan.
        measured: the same, from the tracker.
    """
    unit = unit_for(planned["peak_bytes"])
    lines = [f"{'Memory at the peak':18}{'planned':>14}{'measured':>14}{'difference':>12}"]
    rows = [(name, planned["at_peak"][name], measured["at_peak"][name]) for name in COMPONENTS]
    rows.append(("all", planned["peak_bytes"], measured["peak_bytes"]))
    places = (("on the host", "host_bytes"), ("on disk", "disk_bytes"))
    rows += [(name, planned[key], measured[key]) for name, key in places if planned[key] or measured[key]]
    for name, expected, found in rows:
        share = f"{(found - expected) / expected:+.2%}" if expected else ("0.00%" if found == 0 else "new")
        amounts = "".join(f"{size / unit.size:>10,.2f} {unit.name}" for size in (expected, found))
        lines.append(f"{_words(name):18}{amounts}{share:>12}")
    lines.append(
        f"Peak in {_words(planned['peak_phase'])} (planned), {_words(measured['peak_phase'])} (measured). "
        f"{unit.legend()}."
    )
    return "\n".join(lines)
