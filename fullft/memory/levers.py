"""What would help: options that need fewer bytes, and neighbours of full fine-tuning on one or more GPUs.

Levers are exact: each is a plan of its own. LoRA, QLoRA, ZeRO and the time are estimates, by the formulas in their
docstrings.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from fullft.config.config import Config, parse_offload
from fullft.hardware import PEAK_FLOPS
from fullft.memory.choose import Plans, recomputed_share, recomputing_time
from fullft.memory.facts import Facts
from fullft.memory.machine import Device
from fullft.memory.plan import Batch, num_layers
from fullft.memory.tracker import COMPONENTS
from fullft.transforms.activation_checkpointing import checkpointing_of

# ---------------------------------------------------------------------------------------------- levers

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
        config: without any auto.
        plans: of the model.
        batch: the largest micro-batches.
        device: where the host's memory is its own, only a disk helps.
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
    # What depends on the batch is at most what is there beside weights, gradients and states: often not worth a trace.
    share = _beside_states(plans, config, batch) / plans.of(config, batch)["peak_bytes"]
    if batch.sequences > 1 and share > 2 * _WORTH_IT:
        steps = (config.gradient_accumulation_steps or 1) * batch.sequences
        yield _Candidate(
            "--per_device_train_batch_size 1",
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": steps},
            {"sequences": 1},
            "some",
            f"accumulate {steps}",
        )
    elif batch.length >= 256 and share > 6 * _WORTH_IT:
        half = batch.length // 2
        sizes = {"length": half, "evaluation_length": min(half, batch.evaluation_length)}
        yield _Candidate(f"--max_length {half}", {}, sizes, "a gain", "longer rows are cut")
    if config.precision != "bf16-true":
        time = "a gain" if config.precision == "fp32" else "none"
        yield _Candidate("--precision bf16-true", {"precision": "bf16-true"}, {}, time, "computes in bf16")
    placed = parse_offload(config.offload)
    if config.optim == "adamw" and "optimizer" not in placed:
        yield _Candidate("--optim adamw_8bit", {"optim": "adamw_8bit"}, {}, "little", "coarser moments")
    if config.activation_checkpointing != "full" and share > 2 * _WORTH_IT:
        price = "may round otherwise" if config.compile == "true" else "nothing"
        for mode in ("selective", "full") if checkpointing_of(config) == "none" else ("full",):
            other = replace(config, activation_checkpointing=mode)
            longer = (3 + recomputing_time(other)) / (3 + recomputing_time(config)) - 1
            options = {"activation_checkpointing": mode}
            yield _Candidate(f"--activation_checkpointing {mode}", options, {}, f"about +{longer:.0%}", price)
    yield from _offloads(config, placed, tier)


def _offloads(config: Config, placed: dict[str, str], tier: str) -> Iterator[_Candidate]:
    """Move one thing more to the host or to disk, as `--fit auto` does by itself."""
    for what in ("optimizer", "gradients", "parameters"):
        if what in placed or (what == "optimizer" and config.optim.startswith("paged")):
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


def _beside_states(plans: Plans, config: Config, batch: Batch) -> int:
    """Bytes at the peak that a smaller batch could do without: not the states, nor autocast's copies of the weights."""
    at_peak = plans.of(config, batch)["at_peak"]
    rest = sum(at_peak[name] for name in ("activations", "logits", "temporaries", "other"))
    return int(rest - (2 * plans.facts(batch.length).matrices if config.precision == "bf16-mixed" else 0))


# ---------------------------------------------------------------------------------------------- adapters


def estimate_adapters(config: Config, plans: Plans, batch: Batch) -> tuple[dict[str, int], dict[str, int]]:
    """Estimate what LoRA and QLoRA (rank 8 on queries and values) need for the same batch, per component.

    With N parameters, M of them in the layers' matrices, and A in the adapters:

    - parameters: LoRA 2 N + 4 A (bf16 weights, fp32 adapters); QLoRA 2 (N - M) + (0.5 + 1/64 + 4/16384) M + 4 A: four
      bits per weight, a byte per block of 64 and an fp32 number per 256 blocks ("double quantisation")
    - gradients 4 A, optimizer states 8 A
    - activations and logits: the maxima of the plan with bf16 weights and the same checkpointing; temporaries: what
      else is alive in that plan's forward. QLoRA also holds a dequantised matrix: less than a layer's 2 M / layers

    Args:
        config: without any auto.
        plans: of the model.
        batch: the largest micro-batches.

    Returns:
        Bytes per component of LoRA, and of QLoRA.

    Source: Hu et al., "LoRA" (2021); Dettmers et al., "QLoRA" (2023), section 3.
    """
    facts = plans.facts(batch.length)
    adapters = facts.lora_parameters
    planned = plans.of(replace(config, precision="bf16-true", offload="none"), batch)
    own = planned["components"]
    accumulated = own["gradients"] if (config.gradient_accumulation_steps or 1) > 1 else 0
    in_forward = planned["phases"]["forward"] - own["parameters"] - own["optimizer_states"] - accumulated
    lora = own | {
        "parameters": 2 * facts.parameters + 4 * adapters,
        "gradients": 4 * adapters,
        "optimizer_states": 8 * adapters,
        # Without the gradient of the head, which is frozen.
        "temporaries": max(
            0,
            in_forward
            - own["activations"]
            - own["logits"]
            - own["other"]
            - 2 * (facts.matrices - facts.layer_matrices),
        ),
    }
    four_bits = (0.5 + 1 / 64 + 4 / 16384) * facts.layer_matrices
    qlora = lora | {
        "parameters": round(2 * (facts.parameters - facts.layer_matrices) + four_bits + 4 * adapters),
        "temporaries": lora["temporaries"] + 2 * facts.layer_matrices // num_layers(plans.model_config),
    }
    return lora, qlora


# ---------------------------------------------------------------------------------------------- several GPUs


def estimate_zero(config: Config, plans: Plans, batch: Batch, stage: int, gpus: int) -> int:
    """Estimate the bytes per GPU when ZeRO spreads a run's components over GPUs, each with its own micro-batch.

    With weights P, gradients G, optimizer states O and the rest R at the peak of the plan: stage 1 needs
    P + G + O/n + R, stage 2 P + (G + O)/n + R, stage 3 (P + G + O)/n + R', where R' holds the weights of two layers in
    bf16 (one at work, one on its way) in place of autocast's copies of all.

    Args:
        config: without any auto.
        plans: of the model.
        batch: the largest micro-batches of each GPU.
        stage: 1, 2 or 3.
        gpus: n.

    Source: Rajbhandari et al., "ZeRO" (2020), section 5.
    """
    at_peak = plans.of(replace(config, offload="none"), batch)["at_peak"]
    spread = ("optimizer_states", "gradients", "parameters")[:stage]
    rest = sum(at_peak[name] for name in COMPONENTS if name not in spread)
    if stage == 3 and gpus > 1:
        facts = plans.facts(batch.length)
        copies = 2 * facts.matrices if config.precision == "bf16-mixed" else 0
        rest += 2 * 2 * facts.layer_matrices // num_layers(plans.model_config) - min(copies, at_peak["temporaries"])
    return int(rest + sum(at_peak[name] for name in spread) // gpus)


# ---------------------------------------------------------------------------------------------- time

MFU = 0.4  # a well-fed GPU's share of its peak
ROWS = 1000  # of the default dataset
GPUS = {name: PEAK_FLOPS[name] for name in ("A100", "H100")}  # whose hours a plan shows


@dataclass(frozen=True)
class Work:
    """How much a run computes.

    Attributes:
        rows: sequences, over all epochs.
        tokens: at most, were every row as long as allowed.
        training_flops: of forward and backward.
        flops: of forward, backward and recomputation.
    """

    rows: int
    tokens: int
    training_flops: float
    flops: float

    def hours(self, peak_flops: float) -> float:
        """Give the GPU-hours on a GPU with so many operations per second at its peak."""
        return self.flops / (MFU * peak_flops) / 3600


def estimate_work(config: Config, facts: Facts, batch: Batch) -> Work:
    """Estimate a run's operations: tokens x (those of `flops_per_token` + a third of them for recomputed layers).

    Args:
        config: without any auto; the length of the run counts.
        facts: of the model.
        batch: the largest micro-batches.
    """
    rows = config.num_train_epochs * (ROWS - -(-ROWS * config.val_size // 1))
    if config.max_steps > 0:
        rows = config.max_steps * int(config.global_batch_size or 1)
    recomputed = recomputed_share(config.activation_checkpointing)
    tokens = round(rows) * batch.length
    flops = tokens * facts.flops_per_token
    return Work(round(rows), tokens, flops, flops * (1 + recomputed / 3))
