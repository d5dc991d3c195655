"""Traffic: what each tier holds, and what moves between tiers in a step, by arithmetic alone.

Nothing is traced here: hopeless choices cost a plan nothing, and the others can be ranked.
"""

from dataclasses import dataclass, fields

from fullft.config.config import Config
from fullft.memory.facts import Facts
from fullft.memory.speeds import Speeds

TIERS = ("device", "host", "disk")


@dataclass(frozen=True)
class Sizes:
    """Bytes of what is there at the optimizer step, on one rank or on all that share a copy of the model.

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
    """Count what a run holds, in whatever tier.

    Args:
        config: its number formats are read.
        facts: of the model.
    """
    numerics, count = config.numerics, facts.parameters
    weight = numerics.weights.bytes
    remainder = 2 if numerics.splits else 0
    moments = facts.states_8bit if config.has_8bit_moments else 2 * numerics.moments.bytes * count
    return Sizes(
        weights=weight * count,
        layer_weights=weight * facts.layer_parameters,
        gradients=numerics.gradients.bytes * count,
        states=moments + remainder * count,
    )


def own_sizes_of(config: Config, facts: Facts) -> Sizes:
    """Count what a run holds on one rank, in whatever tier: its rows.

    Args:
        config: its number formats and ranks are read.
        facts: of the model.
    """
    whole, count = sizes_of(config, facts), config.group.count
    return Sizes(*(getattr(whole, each.name) // count for each in fields(Sizes)))


def held_bytes(config: Config, facts: Facts, activations: int = 0) -> dict[str, int]:
    """Return what each tier holds at the optimizer step: no choice of checkpointing needs less.

    Of a sharded model it is what a rank holds then, or at the end of forward if that is more.

    Args:
        config: its number formats, placement and ranks are read.
        facts: of the model.
        activations: that several ranks each keep in forward, if that is known.
    """
    sizes, placement = own_sizes_of(config, facts), config.placement
    held = dict.fromkeys(TIERS, 0)
    held["device"] += sizes.weights - sizes.layer_weights
    held[placement.parameters] += sizes.layer_weights
    held["device" if placement.optimizer == "paged" else placement.optimizer] += sizes.states
    if placement.gradients != "released":
        held[placement.gradients] += sizes.gradients
    if config.gpus > 1:
        in_step = sizes.gradients if placement.gradients == "device" else 0
        held["device"] += max(0, _held_in_forward(config, facts, in_step) + activations - in_step)
    return held


def _held_in_forward(config: Config, facts: Facts, in_step: int) -> int:
    """Return the bytes of whole weights and of sums when the last forward of a step ends."""
    whole = sizes_of(config, facts)
    weights = 0 if config.shard == "full" else whole.weights
    if not config.accumulates:
        return weights
    return weights + (whole.gradients if config.shard in ("none", "optimizer") else in_step)


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
        """Add two parts of a step."""
        return Traffic(
            self.to_device + other.to_device,
            self.from_device + other.from_device,
            self.disk_read + other.disk_read,
            self.disk_write + other.disk_write,
        )

    def link_seconds(self, speeds: Speeds) -> float:
        """Return the time of the link between host and device.

        It carries both ways at once. A CPU copies one after the other, and from the host alone: what is on disk is read
        into its place.
        """
        if speeds.overlaps:
            return max(self.to_device, self.from_device) / speeds.link
        copied = max(0, self.to_device - self.disk_read) + max(0, self.from_device - self.disk_write)
        return copied / speeds.link

    def disk_seconds(self, speeds: Speeds) -> float:
        """Return the time of the disk, which reads and writes in turn."""
        return self.disk_read / speeds.disk_read + self.disk_write / speeds.disk_write


def estimate_traffic(config: Config, facts: Facts) -> tuple[Traffic, Traffic]:
    """Count what moves during forward and backward, and what moves in clipping and in the optimizer step.

    With `a` micro-batches: each layer's weights come twice per micro-batch; gradients leave once per micro-batch, and
    on disk all but the first are read before they are added to; the norm reads them, and the step reads them again;
    the step reads and writes states, and weights that live elsewhere.

    Of a sharded model a rank moves its rows; gradients leave as sums, as often as they are summed over ranks.

    Args:
        config: its number formats, placement and ranks are read.
        facts: of the model.
    """
    sizes, offloaded = own_sizes_of(config, facts), config.placement.offloaded
    a = config.gradient_accumulation_steps
    if config.gpus > 1 and config.shard in ("none", "optimizer"):
        a = 1
    during, after = Traffic(), Traffic()
    if tier := offloaded.get("parameters"):
        during += _moved(tier, read=2 * a * sizes.layer_weights)
        after += _moved(tier, read=sizes.layer_weights, written=sizes.layer_weights)
    if (tier := offloaded.get("gradients", "released")) != "released":
        on_disk = tier == "disk"
        during += Traffic(
            from_device=a * (sizes.weights if config.gpus == 1 else sizes.gradients),
            disk_read=(a - 1) * sizes.gradients * on_disk,
            disk_write=a * sizes.gradients * on_disk,
        )
        after += _moved(tier, read=2 * sizes.gradients)
    if tier := offloaded.get("optimizer"):
        after += _moved(tier, read=sizes.states, written=sizes.states)
    return during, after


def _moved(tier: str, read: int, written: int = 0) -> Traffic:
    on_disk = tier == "disk"
    return Traffic(read, written, read * on_disk, written * on_disk)
