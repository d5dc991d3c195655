"""Levers: options that would need fewer bytes. Each is measured by a plan of its own."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from fullft.config.config import Config
from fullft.config.numerics import Format
from fullft.config.recomputation import Recomputation
from fullft.memory.choose import Plans, recomputing_time
from fullft.memory.machine import Device
from fullft.memory.plan import Batch
from fullft.memory.stages import possible_stages
from fullft.transforms.activation_checkpointing import recomputation_of

ALL = "all of these"
_WORTH_IT = 0.02  # of the peak: a lever that saves less is not shown


@dataclass(frozen=True)
class Lever:
    """Options that need fewer bytes.

    Attributes:
        flags: what to type.
        saved_bytes: of the peak.
        peak_bytes: what is needed then.
        time: its price, or gain, in time.
        price: what else changes.
    """

    flags: str
    saved_bytes: int
    peak_bytes: int
    time: str
    price: str


@dataclass(frozen=True)
class _Candidate:
    flags: str
    options: dict[str, Any]
    batch: dict[str, int]
    time: str
    price: str


def find_levers(config: Config, plans: Plans, batch: Batch, device: Device) -> list[Lever]:
    """List what would lower the peak, the cheapest in time first, and all of it together last.

    Args:
        config: nothing is left to the plan.
        plans: of the model.
        batch: the largest micro-batches.
        device: where it shares the host's memory, only a disk helps.
    """
    peak = plans.of(config, batch)["peak_bytes"]
    options: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    levers: list[Lever] = []
    for each in _candidates(config, plans, batch, "disk" if device.is_host else "host"):
        lowered = _peak(plans, config, each.options, batch, each.batch)
        if peak - lowered >= _WORTH_IT * peak:
            levers.append(Lever(each.flags, peak - lowered, lowered, each.time, each.price))
            options, sizes = options | each.options, sizes | each.batch
    if len(levers) > 1:
        lowered = _peak(plans, config, options, batch, sizes)
        levers.append(Lever(ALL, peak - lowered, lowered, "", ""))
    return levers


def _peak(plans: Plans, config: Config, options: dict[str, Any], batch: Batch, sizes: dict[str, int]) -> int:
    return plans.peak_bytes(replace(config, **options), replace(batch, **sizes))


def _candidates(config: Config, plans: Plans, batch: Batch, tier: str) -> Iterator[_Candidate]:
    # What depends on the batch is at most the rest, without weights, gradients and states: often not worth a trace.
    share = _besides_states(plans, config, batch) / plans.of(config, batch)["peak_bytes"]
    tokens, micro_batches = config.micro_batch_tokens or 0, config.gradient_accumulation_steps
    if tokens >= 2 * batch.length and share > 2 * _WORTH_IT:
        fewer = {"micro_batch_tokens": tokens // 2, "gradient_accumulation_steps": 2 * micro_batches}
        flags = f"--micro_batch_tokens {tokens // 2}"
        yield _Candidate(flags, fewer, {}, "some", f"accumulate {2 * micro_batches}")
    elif batch.sequences > 1 and share > 2 * _WORTH_IT:
        steps = config.gradient_accumulation_steps * batch.sequences
        yield _Candidate(
            "--per_device_train_batch_size 1",
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": steps},
            {"sequences": 1, "evaluation_sequences": 1},
            "some",
            f"accumulate {steps}",
        )
    elif batch.length >= 256 and share > 6 * _WORTH_IT:
        half = batch.length // 2
        sizes = {"length": half, "evaluation_length": min(half, batch.evaluation_length)}
        fewer = {"micro_batch_tokens": min(tokens, half)} if tokens else {}
        yield _Candidate(f"--max_length {half}", fewer, sizes, "a gain", "longer rows are cut")
    numerics, offloaded = config.numerics, config.placement.offloaded
    if numerics.weights is not Format.BF16:
        time = "a gain" if numerics.computation is Format.FP32 else "none"
        yield _Candidate("--precision bf16-true", {"precision": "bf16-true"}, {}, time, "computes in bf16")
    if not config.has_8bit_moments and "optimizer" not in offloaded and _may_have_8bit_moments(config, plans):
        yield _Candidate("--optim adamw_8bit", {"optim": "adamw_8bit"}, {}, "little", "coarser moments")
    if config.recomputation != Recomputation.parse("full") and share > 2 * _WORTH_IT:
        price = "may round otherwise" if config.compiles else "nothing"
        for mode in ("selective", "full") if not recomputation_of(config).is_any else ("full",):
            other = replace(config, activation_checkpointing=mode)
            longer = (3 + recomputing_time(other)) / (3 + recomputing_time(config)) - 1
            options = {"activation_checkpointing": mode}
            yield _Candidate(f"--activation_checkpointing {mode}", options, {}, f"about +{longer:.0%}", price)
    yield from _offloads(config, offloaded, tier)


def _may_have_8bit_moments(config: Config, plans: Plans) -> bool:
    other = replace(config, optim="adamw_8bit")
    return config.gpus == 1 or config.shard in possible_stages(other, plans.model_config)


def _offloads(config: Config, placed: dict[str, str], tier: str) -> Iterator[_Candidate]:
    """Move one thing more to the host or to disk, as `--fit auto` does by itself."""
    for what in ("optimizer", "gradients", "parameters") if config.gpus == 1 else ("optimizer", "gradients"):
        if what in placed or (what == "optimizer" and config.placement.optimizer == "paged"):
            continue
        placed = placed | {what: tier}
        offload = ",".join(f"{each}={where}" for each, where in placed.items())
        options = {"offload": offload}
        if "parameters" in placed:
            options["activation_checkpointing"] = "full"
        yield _Candidate(
            f"--offload {offload}",
            options,
            {},
            "by the link" if tier == "host" else "by the disk",
            "",
        )


def _besides_states(plans: Plans, config: Config, batch: Batch) -> int:
    """Return the bytes at the peak that a smaller batch could save: not the states, nor autocast's copies."""
    at_peak = plans.of(config, batch)["at_peak"]
    rest = sum(at_peak[name] for name in ("activations", "logits", "temporaries", "other"))
    return int(rest - (2 * plans.facts(batch.length).matrices if config.numerics.autocast else 0))
