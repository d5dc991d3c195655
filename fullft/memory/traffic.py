"""What rests where and what moves in a step, as far as that does not depend on activations, and the seconds it takes.

Owns the arithmetic of `--offload`: no trace, so that hopeless choices cost a plan nothing, and choices can be ranked.
"""

from dataclasses import dataclass

from fullft.config.config import Config, parse_offload
from fullft.memory.facts import Facts
from fullft.memory.machine import Speeds
from fullft.model.parts import PRECISIONS

TIERS = ("device", "host", "disk")


@dataclass(frozen=True)
class Sizes:
    """Bytes of what is there at the optimizer step.

    Attributes:
        weights: in the dtype that computes.
        layer_weights: those of the decoder layers among them, which `parameters=` moves.
        gradients: their sums.
        states: moments and remainders.
    """

    weights: int
    layer_weights: int
    gradients: int
    states: int


def sizes_of(config: Config, facts: Facts) -> Sizes:
    """Count what a run holds, wherever that is.

    Args:
        config: precision, master weights, optimizer and accumulation count.
        facts: of the model.
    """
    size, count = PRECISIONS[config.precision].weights.itemsize, facts.parameters
    has_masters = config.precision == "bf16-true" and config.master_weights != "none"
    gradient = 4 if has_masters and (config.gradient_accumulation_steps or 1) > 1 else size
    remainder = 2 if has_masters and config.master_weights == "split" else 0
    moments = moment_bytes(config) * count if config.optim == "adamw" else facts.states_8bit
    return Sizes(size * count, size * facts.layer_parameters, gradient * count, moments + remainder * count)


def moment_bytes(config: Config) -> int:
    """Give the bytes per parameter of AdamW's two moments, where they are not in 8 bits."""
    return 4 if config.precision == "bf16-true" and config.master_weights == "none" else 8


def resting_bytes(config: Config, facts: Facts) -> dict[str, int]:
    """Give what each tier holds at the optimizer step: no choice of checkpointing goes below it.

    Args:
        config: without any auto in `offload`.
        facts: of the model.
    """
    sizes, placed = sizes_of(config, facts), parse_offload(config.offload)
    held = dict.fromkeys(TIERS, 0)
    held["device"] += sizes.weights - sizes.layer_weights
    held[placed.get("parameters", "device")] += sizes.layer_weights
    held[placed.get("optimizer", "device")] += sizes.states
    if placed.get("gradients") != "released":
        held[placed.get("gradients", "device")] += sizes.gradients
    return held


@dataclass(frozen=True)
class Traffic:
    """Bytes that a step moves.

    Attributes:
        to_device: over the link, from host and disk.
        from_device: over the link.
        disk_read: from disk.
        disk_write: to disk.
    """

    to_device: int = 0
    from_device: int = 0
    disk_read: int = 0
    disk_write: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        """Add two parts of a step up."""
        return Traffic(
            self.to_device + other.to_device,
            self.from_device + other.from_device,
            self.disk_read + other.disk_read,
            self.disk_write + other.disk_write,
        )

    def seconds(self, speeds: Speeds) -> float:
        """Give the time that the busiest way takes, all of them at work at once; a disk reads and writes in turn."""
        link = max(self.to_device, self.from_device) / speeds.link
        return max(link, self.disk_read / speeds.disk_read + self.disk_write / speeds.disk_write)


def estimate_traffic(config: Config, facts: Facts) -> tuple[Traffic, Traffic]:
    """Count what moves beside forward and backward, and what moves in clipping and in the optimizer step.

    With `a` micro-batches: each layer's weights come twice per micro-batch; gradients leave once per micro-batch, and
    on disk all but the first are read before they are added to; the norm reads them, and the step reads them again;
    the step reads and writes states, and weights that are at home elsewhere.

    Args:
        config: without any auto in `offload`.
        facts: of the model.
    """
    sizes, placed = sizes_of(config, facts), parse_offload(config.offload)
    a = config.gradient_accumulation_steps or 1
    beside, after = Traffic(), Traffic()
    if tier := placed.get("parameters"):
        beside += _moved(tier, read=2 * a * sizes.layer_weights)
        after += _moved(tier, read=sizes.layer_weights, written=sizes.layer_weights)
    if (tier := placed.get("gradients", "released")) != "released":
        on_disk = tier == "disk"
        beside += Traffic(
            from_device=a * sizes.weights,
            disk_read=(a - 1) * sizes.gradients * on_disk,
            disk_write=a * sizes.gradients * on_disk,
        )
        after += _moved(tier, read=2 * sizes.gradients)
    if tier := placed.get("optimizer"):
        after += _moved(tier, read=sizes.states, written=sizes.states)
    return beside, after


def _moved(tier: str, read: int, written: int = 0) -> Traffic:
    on_disk = tier == "disk"
    return Traffic(read, written, read * on_disk, written * on_disk)


def estimate_seconds(config: Config, facts: Facts, tokens: int, speeds: Speeds, recomputed: float) -> float:
    """Estimate a step's time: computing, or the traffic beside it if that takes longer, and the traffic after it.

    Args:
        config: without any auto.
        facts: of the model.
        tokens: of a micro-batch.
        speeds: of the machine.
        recomputed: the time of recomputing, as a share of that of the forward pass.
    """
    a = config.gradient_accumulation_steps or 1
    computing = a * tokens * facts.flops_per_token * (1 + recomputed / 3) / speeds.flops
    beside, after = estimate_traffic(config, facts)
    return max(computing, beside.seconds(speeds)) + after.seconds(speeds)
