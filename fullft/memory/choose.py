"""The choice of `--fit auto`: the fastest exact way to run within the memory there is.

Only what the user left at auto is set. `choices` is the one place to add a way to need less memory.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig

from fullft.config.config import Config
from fullft.config.placement import Placement, placements
from fullft.config.recomputation import Recomputation
from fullft.data.dealing import Dealing
from fullft.memory.facts import Facts, find_facts
from fullft.memory.machine import Device, margin_bytes
from fullft.memory.plan import Batch, plan_step
from fullft.memory.speeds import ASSUMED, Speeds
from fullft.memory.stages import possible_stages, require_stage
from fullft.memory.step_time import estimate_seconds
from fullft.memory.traffic import held_bytes
from fullft.memory.units import GIB, Unit, unit_for

# ---------------------------------------------------------------------------------------------- what is needed


class Plans:
    """The plans of one model, each made when it is first asked for.

    Args:
        model_config: of a causal language model.
    """

    def __init__(self, model_config: PreTrainedConfig) -> None:
        self.model_config = model_config
        self._known: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._facts: dict[int, Facts] = {}
        self._activations: dict[tuple[Any, ...], int] = {}

    def of(self, config: Config, batch: Batch) -> dict[str, Any]:
        """Plan a run.

        Args:
            config: as in `plan_step`.
            batch: the largest micro-batches; of a step that is dealt by tokens, what one sequence of it makes.
        """
        key = self._key(config, batch)
        if key not in self._known:
            planned = self._known[key] = plan_step(config, self.model_config, batch.under(config))
            self._activations[_what_is_kept(config, batch)] = planned["components"]["activations"]
        return self._known[key]

    def least_bytes(self, config: Config, batch: Batch) -> dict[str, int]:
        """Return what each tier has to hold at least, as far as that is known without another trace.

        Activations are the same in every stage of sharding and in every placement of the rest.

        Args:
            config: as in `plan_step`.
            batch: the largest micro-batches.
        """
        known = self._activations.get(_what_is_kept(config, batch), 0)
        return held_bytes(config, self.facts(batch.length), known)

    def of_training(self, config: Config, batch: Batch) -> dict[str, Any]:
        """Plan training alone, unless more is known: evaluation has no gradients, keeps no activations, and is no peak.

        Args:
            config: as in `plan_step`.
            batch: the largest micro-batches.
        """
        return self._known.get(self._key(config, batch)) or self.of(config, replace(batch, evaluation_length=0))

    def peak_bytes(self, config: Config, batch: Batch) -> int:
        """Plan no more than a run's peak.

        Args:
            config: as in `plan_step`.
            batch: the largest micro-batches.
        """
        return int(self.of_training(config, batch)["peak_bytes"])

    def known_peak(self, config: Config, batch: Batch) -> int:
        """Return a run's peak if it has been planned already, else 0.

        Args:
            config: as in `plan_step`.
            batch: the largest micro-batches.
        """
        return int(self._known.get(self._key(config, batch), {"peak_bytes": 0})["peak_bytes"])

    def _key(self, config: Config, batch: Batch) -> tuple[Any, ...]:
        layout = (config.numerics, config.placement, config.recomputation, config.compiles)
        ranks = (config.shard, config.group) if config.gpus > 1 else ()
        return (*layout, *ranks, config.accumulates, config.joins_rows, config.max_grad_norm > 0, batch.under(config))

    def facts(self, length: int) -> Facts:
        """Count what follows from the model's shapes alone.

        Args:
            length: tokens per sequence.
        """
        if length not in self._facts:
            self._facts[length] = find_facts(self.model_config, length)
        return self._facts[length]


def _what_is_kept(config: Config, batch: Batch) -> tuple[Any, ...]:
    """Return what activations depend on, besides the model."""
    return (config.numerics.computation, config.recomputation, config.compiles, config.joins_rows, batch.under(config))


# ---------------------------------------------------------------------------------------------- choosing


_SHOWN = 2  # faster choices that did not fit
_CHEAP = 0.3  # the share of the forward pass that `selective` recomputes, measured on a CPU


@dataclass(frozen=True)
class Choice:
    """One exact way to run.

    Attributes:
        activation_checkpointing: the option's word.
        placement: where things live.
        shard: the option's word; None for a run on one device.
        dealing: how a step's sequences are dealt by tokens; None where they are dealt by number.
        seconds: of a step, estimated.
    """

    activation_checkpointing: str
    placement: Placement
    shard: str | None = None
    dealing: Dealing | None = None
    seconds: float = 0.0

    @staticmethod
    def of(config: Config) -> "Choice":
        """Return what options say."""
        shard = config.shard if config.gpus > 1 else None
        return Choice(config.activation_checkpointing, config.placement, shard, dealing_of(config))

    def apply(self, config: Config) -> Config:
        """Set the options."""
        changes: dict[str, Any] = {} if self.shard is None else {"shard": self.shard}
        if self.dealing is not None:
            changes |= dealt_by(self.dealing)
        changes |= {"activation_checkpointing": self.activation_checkpointing, "offload": str(self.placement)}
        return replace(config, **changes)

    @property
    def where(self) -> tuple[str | None, Placement, Dealing | None]:
        """Where things are, and how many tokens at a time: the same for several ways to recompute."""
        return self.shard, self.placement, self.dealing

    def describe(self) -> str:
        """Name what it sets."""
        shard = f"shard {self.shard}, " if self.shard is not None else ""
        offload = f", offload {self.placement}" if self.placement.offloaded else ""
        tokens = "" if self.dealing is None else f", micro-batches of at most {self.dealing.tokens:,} tokens"
        return f"{shard}activation_checkpointing {self.activation_checkpointing}{offload}{tokens}"


def dealing_of(config: Config) -> Dealing | None:
    """Return how a step is dealt by tokens; None where it is not, or not yet decided."""
    return Dealing(config.micro_batch_tokens, config.gradient_accumulation_steps) if config.micro_batch_tokens else None


def dealt_by(dealing: Dealing) -> dict[str, int]:
    """Return the options that say how a step is dealt by tokens."""
    return {"micro_batch_tokens": dealing.tokens, "gradient_accumulation_steps": dealing.micro_batches}


def recomputing_time(config: Config) -> float:
    """Return the time of recomputing, as a share of that of the forward pass.

    Args:
        config: nothing is left to the plan.
    """
    if config.recomputation.selective:
        return 0.0 if config.compiles else _CHEAP
    return config.recomputation.share


def step_seconds(config: Config, facts: Facts, batch: Batch, speeds: Speeds) -> float:
    """Estimate a step's time.

    Args:
        config: nothing is left to the plan.
        facts: of the model.
        batch: the largest micro-batches.
        speeds: of the machine.
    """
    dealt = batch.under(config)
    return estimate_seconds(config, facts, dealt.sequences * dealt.length, speeds, recomputing_time(config))


def choices(
    config: Config,
    plans: Plans,
    batch: Batch,
    device: Device,
    speeds: Speeds,
    dealings: Sequence[Dealing] = (),
) -> list[Choice]:
    """List what may be set in place of auto, the fastest first by estimate.

    Each choice gives the same losses: to the bit or, compiled or on several ranks, up to rounding. Nothing is offloaded
    to the host where the device shares the host's memory. Ranks that share a model do not stream its layers too.

    Args:
        config: what it leaves open is chosen.
        plans: of the model.
        batch: the largest micro-batches.
        device: to fit on.
        speeds: of the machine.
        dealings: ways to deal a step by tokens, where that is open.
    """
    tiers = ("device", "disk") if device.is_host else ("device", "host", "disk")
    possible = list(placements(tiers)) if "offload" in config.undecided else [config.placement]
    stages: list[str | None] = [config.shard if config.gpus > 1 else None]
    if "shard" in config.undecided:
        stages = [*possible_stages(config, plans.model_config)]
    modes = [config.activation_checkpointing]
    if "activation_checkpointing" in config.undecided:
        # `selective` saves about as much as recomputing every other layer, and takes less time.
        modes = ["none", "every_2" if config.compiles else "selective", "full"]
    facts = plans.facts(batch.length)
    ways: Sequence[Dealing | None] = dealings or [dealing_of(config)]
    found = []
    for stage, placement, mode, dealing in itertools.product(stages, possible, modes, ways):
        if placement.streams_layers and (mode != "full" or stage is not None):
            continue  # a layer whose weights have left the device must be recomputed
        if placement.optimizer != "device" and config.placement.optimizer == "paged":
            continue  # the driver places these states
        choice = Choice(mode, placement, stage, dealing)
        found.append(replace(choice, seconds=step_seconds(choice.apply(config), facts, batch, speeds)))
    return sorted(found, key=lambda choice: (choice.seconds, len(choice.placement.offloaded)))


def choose(
    config: Config,
    plans: Plans,
    batch: Batch,
    device: Device,
    speeds: Callable[[], Speeds],
    dealings: Sequence[Dealing] = (),
) -> tuple[Config, str]:
    """Set what the user left at auto to the fastest exact choice that fits, or to that which needs least if none does.

    Precision, optimizer, global batch and packing are never touched.

    Args:
        config: resolved options.
        plans: of the model.
        batch: the largest micro-batches.
        device: to fit on.
        speeds: measures the machine; asked only where something must be ranked by them.
        dealings: ways to deal a step by tokens, where that is open.

    Returns:
        The options with nothing left open, and a line that says what was chosen and why.

    Raises:
        OptionsError: the model cannot be sharded as asked.
    """
    if config.gpus > 1 and "shard" not in config.undecided:
        require_stage(config, plans.model_config)
    if not config.undecided & {"activation_checkpointing", "offload", "shard", "micro_batch_tokens"}:
        return config, f"{Choice.of(config).describe()}: as asked"
    # Most runs fit without moving anything, and then nothing needs to be measured, unless stages must be ranked.
    is_open = "offload" in config.undecided
    known = speeds() if "shard" in config.undecided else ASSUMED
    ranked = choices(replace(config, offload="none") if is_open else config, plans, batch, device, known, dealings)
    choice = _first_to_fit(ranked, config, plans, batch, device)
    if choice is None and is_open:
        ranked = choices(config, plans, batch, device, speeds(), dealings)
        choice = _first_to_fit(ranked, config, plans, batch, device)
    return _explained(config, plans, batch, device, choice, ranked)


def _first_to_fit(ranked: list[Choice], config: Config, plans: Plans, batch: Batch, device: Device) -> Choice | None:
    hopeless = set()
    for choice in ranked:
        chosen = choice.apply(config)
        if choice.where in hopeless or not _has_room(device, plans.least_bytes(chosen, batch)):
            continue
        if fits(plans.of(chosen, batch), device):
            return choice
        # Where even recomputing everything is not enough, no other checkpointing needs to be tried.
        least = replace(chosen, activation_checkpointing=_least(ranked, choice))
        if not fits(plans.of(least, batch), device):
            hopeless.add(choice.where)
    return None


def _least(ranked: list[Choice], like: Choice) -> str:
    """Return the checkpointing that needs least memory of those that may be chosen."""
    modes = [choice.activation_checkpointing for choice in ranked if choice.where == like.where]

    def saving(mode: str) -> tuple[float, bool]:
        recomputation = Recomputation.parse(mode)
        return recomputation.share, recomputation.selective

    return max(modes, key=saving)


def _explained(
    config: Config, plans: Plans, batch: Batch, device: Device, choice: Choice | None, ranked: list[Choice]
) -> tuple[Config, str]:
    if choice is None:
        facts = plans.facts(batch.length)
        modest = min(ranked, key=lambda each: (held_bytes(each.apply(config), facts)["device"], each.seconds))
        least = replace(modest, activation_checkpointing=_least(ranked, modest))
        lack = _lack(plans.of(least.apply(config), batch), device)
        return least.apply(
            config
        ), f"{least.describe()}: it needs the least, but even that does not fit {device.name}{lack}"
    chosen = choice.apply(config)
    planned = plans.of(chosen, batch)
    place, unit = ranked.index(choice), unit_for(planned["peak_bytes"])
    costs = choice.seconds / min(each.seconds for each in ranked)
    time = f" ({costs:.2g} x the time of the fastest)" if costs > 1.05 else ""
    spare = f"{unit.amount(device.memory_bytes - _taken(planned, device))} to spare"
    # Graphs that recompute more may round otherwise, and stages add up gradients in other orders.
    exact = "" if config.compiles or config.gpus > 1 else "exact "
    line = f"{choice.describe()}{time}: the fastest {exact}choice to fit {device.name}, {spare}"
    kept = [
        f"{unit.amount(planned[name])} on {where}"
        for name, where in (("host_bytes", "the host"), ("disk_bytes", "disk"))
        if planned[name]
    ]
    line += f"; {', '.join(kept)}" if kept else ""
    if too_large := _too_large(ranked[:place], choice, config, plans, batch, unit):
        line += f"; faster, but too large: {too_large}"
    return chosen, line


def _too_large(faster: list[Choice], taken: Choice, config: Config, plans: Plans, batch: Batch, unit: Unit) -> str:
    """Say what faster choices need, as far as that is known: one of each stage and placement."""
    needs: dict[str, str] = {}
    for choice in faster:
        chosen = choice.apply(config)
        held = plans.least_bytes(chosen, batch)
        device = max(held["device"], plans.known_peak(chosen, batch))
        elsewhere = {"host": held["host"], "disk": held["disk"]}
        needed = [unit.amount(device), *(f"{tier} {unit.amount(size)}" for tier, size in elsewhere.items() if size)]
        name = f"offload {choice.placement}"
        if choice.shard is not None:
            name = f"shard {choice.shard}" + (f" with {name}" if choice.placement.offloaded else "")
        if choice.dealing is not None and choice.where[:2] == taken.where[:2]:
            name = f"{choice.dealing.tokens:,} tokens"
        needs.setdefault(name, f"{name} ({', '.join(needed)})")
    return ", ".join(list(needs.values())[:_SHOWN])


def fits(planned: Mapping[str, Any], device: Device) -> bool:
    """Return whether a planned run has room on the device, the host and the disk.

    Args:
        planned: from `plan_step`.
        device: with its host and its disk.
    """
    return (
        _taken(planned, device) <= device.memory_bytes
        and (device.is_host or planned["host_bytes"] <= device.host_bytes)
        and planned["disk_bytes"] <= device.disk_bytes
    )


def _taken(planned: Mapping[str, Any], device: Device) -> int:
    peak = int(planned["peak_bytes"])
    return peak + (int(planned["host_bytes"]) if device.is_host else margin_bytes(peak))


def _has_room(device: Device, held: Mapping[str, int]) -> bool:
    figures = {"peak_bytes": held["device"], "host_bytes": held["host"], "disk_bytes": held["disk"]}
    return fits(figures, device)


def _lack(planned: Mapping[str, Any], device: Device) -> str:
    """Say what is missing besides the device's memory."""
    return "".join(
        f", which has {GIB.amount(there)} of the {GIB.amount(planned[name])} of {what} that it would take"
        for name, there, what in (
            ("host_bytes", device.host_bytes, "host memory"),
            ("disk_bytes", device.disk_bytes, "disk"),
        )
        if planned[name] > there
    )
