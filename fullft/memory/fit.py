"""What fits: how much memory there is, and the fastest exact way to run within it.

Owns `--fit auto`, which sets only what the user left at auto. `CHOICES` is the one place to add a way to need less.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from fullft.config import Config, parse_size
from fullft.memory.allocator import peak_bytes
from fullft.memory.facts import Facts, find_facts
from fullft.memory.plan import Batch, plan_step
from fullft.memory.units import unit_for
from fullft.model import PRECISIONS

CONTEXT_BYTES = 2**29  # what a CUDA context takes of a card
CARDS = (10, 16, 24, 40, 48, 80, 141)


# ---------------------------------------------------------------------------------------------- what there is


@dataclass(frozen=True)
class Device:
    """Something to run on.

    Attributes:
        name: for people.
        memory_bytes: that a run may take.
    """

    name: str
    memory_bytes: int


def find_device(config: Config, device: torch.device) -> Device:
    """Give the device at hand, or the card that `--device_memory` describes.

    Args:
        config: `device_memory` counts.
        device: where training would run.
    """
    if config.device_memory is not None:
        return Device(f"{config.device_memory} card", max(0, parse_size(config.device_memory) - CONTEXT_BYTES))
    if device.type == "cuda":
        return Device(torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return Device("this Mac's GPU", torch.mps.recommended_max_memory())
    return Device("this machine (CPU)", available_host_bytes())


def cards() -> list[Device]:
    """List the usual cards: nominal GiB, less the context."""
    return [Device(f"{size} GB card", size * 2**30 - CONTEXT_BYTES) for size in CARDS]


def available_host_bytes() -> int:
    """Give the RAM that can be had without swapping, or what the control group leaves of it, whichever is less."""
    return min(_available_ram(), _left_in_cgroup())


def _available_ram() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    # Without it (macOS): all there is, less what we have.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") - peak_bytes(torch.device("cpu"))


def _left_in_cgroup() -> int:
    """Read version 2 of control groups, else version 1; without a limit there is no end."""
    root = Path("/sys/fs/cgroup")
    for folder, limit, usage in (
        (root, "memory.max", "memory.current"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such group, or `max`
            continue
        return most - used + int(stat.get("inactive_file", 0))  # the cache of files is given back
    return sys.maxsize


# ---------------------------------------------------------------------------------------------- what is needed


class Plans:
    """The plans of one model, each made when it is first asked for."""

    def __init__(self, model_config: PreTrainedConfig) -> None:
        """Plan nothing yet.

        Args:
            model_config: of a causal language model.
        """
        self.model_config = model_config
        self._known: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._facts: dict[int, Facts] = {}

    def of(self, config: Config, batch: Batch) -> dict[str, Any]:
        """Plan a run.

        Args:
            config: as in `plan_step`.
            batch: the largest micro-batches.
        """
        key = self._key(config, batch)
        if key not in self._known:
            self._known[key] = plan_step(config, self.model_config, batch)
        return self._known[key]

    def peak_bytes(self, config: Config, batch: Batch) -> int:
        """Plan no more than a run's peak, which evaluation never is: it has no gradients and keeps no activations.

        Args:
            config: as in `plan_step`.
            batch: the largest micro-batches.
        """
        known = self._known.get(self._key(config, batch))
        return int((known or self.of(config, replace(batch, evaluation_length=0)))["peak_bytes"])

    def _key(self, config: Config, batch: Batch) -> tuple[Any, ...]:
        accumulates, clips = (config.gradient_accumulation_steps or 1) > 1, config.max_grad_norm > 0
        choices = (config.precision, config.optim, config.activation_checkpointing, config.packing)
        return (*choices, accumulates, clips, batch)

    def saved_by_8bit(self, config: Config, batch: Batch) -> int:
        """Give the bytes that `--optim adamw_8bit` saves, at the peak and everywhere else.

        Exact without a trace: the states are there all the time, and neither optimizer makes temporaries.

        Args:
            config: with AdamW.
            batch: only its length counts.
        """
        facts = self.facts(batch.length)
        return self._adamw_bytes(config, facts) - facts.states_8bit

    @staticmethod
    def _adamw_bytes(config: Config, facts: Facts) -> int:
        # Two moments in the parameter's dtype, and per tensor a fp32 count of steps.
        return 2 * PRECISIONS[config.precision].weights.itemsize * facts.parameters + 4 * facts.tensors

    def facts(self, length: int) -> Facts:
        """Count what follows from the model's shapes alone.

        Args:
            length: tokens per sequence.
        """
        if length not in self._facts:
            self._facts[length] = find_facts(self.model_config, length)
        return self._facts[length]

    def least_bytes(self, config: Config, batch: Batch) -> int:
        """Give what no choice can go below: weights, gradients and states, which are all there at the step.

        Args:
            config: `precision` and `optim` count.
            batch: only its length counts.
        """
        facts, size = self.facts(batch.length), PRECISIONS[config.precision].weights.itemsize
        states = self._adamw_bytes(config, facts) if config.optim == "adamw" else facts.states_8bit
        return 2 * size * facts.parameters + states


# ---------------------------------------------------------------------------------------------- choosing


@dataclass(frozen=True)
class Choice:
    """One exact way to run.

    Attributes:
        sets: options that the user left at auto.
        costs: its price in time, in words, if it has one.
    """

    sets: Mapping[str, Any]
    costs: str

    def describe(self) -> str:
        """Name what it sets."""
        return ", ".join(f"{option} {value}" for option, value in self.sets.items())


# The fastest first. Recomputing a layer's forward costs a third of its forward and backward.
CHOICES = (
    Choice({"activation_checkpointing": "none"}, ""),
    Choice({"activation_checkpointing": "every_2"}, "17% more computing"),
    Choice({"activation_checkpointing": "full"}, "33% more computing"),
)


def choose_checkpointing(config: Config, plans: Plans, batch: Batch, device: Device) -> tuple[Config, str]:
    """Set what the user left at auto to the fastest choice that fits, or to the one that needs least if none does.

    Precision, optimizer, batch and packing are never touched.

    Args:
        config: resolved options.
        plans: of the model.
        batch: the largest micro-batches.
        device: to fit on.

    Returns:
        The options without any auto, and a line that says what was chosen and why.
    """
    if config.activation_checkpointing != "auto":
        return config, f"activation_checkpointing {config.activation_checkpointing}: as asked"
    if config.fit == "off":
        return replace(config, activation_checkpointing="none"), "activation_checkpointing none: --fit off"
    choices = list(CHOICES)
    slowest = replace(config, **choices[-1].sets)
    if plans.least_bytes(config, batch) > device.memory_bytes:
        choices.clear()  # nothing of what may be chosen touches these
    for place, choice in enumerate(choices):
        chosen = replace(config, **choice.sets)
        peak = plans.of(chosen, batch)["peak_bytes"]
        if peak <= device.memory_bytes:
            costs = f" ({choice.costs})" if choice.costs else ""
            spare = f"{unit_for(peak).amount(device.memory_bytes - peak)} to spare"
            return chosen, f"{choice.describe()}{costs}: the fastest to fit {device.name}, {spare}"
        if place == 0 and plans.peak_bytes(slowest, batch) > device.memory_bytes:
            break
    return slowest, f"{CHOICES[-1].describe()}: it needs least, but nothing fits {device.name}"
