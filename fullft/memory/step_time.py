"""The time of a step, estimated: computing, updating, moving and sending, as far as they do not happen at once."""

from fullft.config.config import Config
from fullft.memory.communication import seconds_with_others
from fullft.memory.facts import Facts
from fullft.memory.speeds import Speeds
from fullft.memory.traffic import Traffic, estimate_traffic, own_sizes_of


def estimate_seconds(config: Config, facts: Facts, tokens: int, speeds: Speeds, recomputed: float) -> float:
    """Estimate a step's time: its micro-batches first, then clipping and the update.

    Each takes as long as the busiest of those who work at once: the device, the link, the disk, and the host's threads
    where gradients are summed there.

    Args:
        config: without any auto.
        facts: of the model.
        tokens: of a micro-batch.
        speeds: of the machine.
        recomputed: the time of recomputing, as a share of that of the forward pass.
    """
    forward = tokens * facts.flops_per_token / 3 / speeds.flops  # backward takes twice as long
    backward = (2 + recomputed) * forward
    if config.gpus == 1:
        computing = config.gradient_accumulation_steps * (forward + backward + _reading(config, facts, speeds))
    else:
        computing = seconds_with_others(config, facts, forward, backward, speeds)
    during, after = estimate_traffic(config, facts)
    summing = _summing_seconds(config, facts, speeds)
    return _together(computing, during, summing, speeds) + _together(_updating(config, facts, speeds), after, 0, speeds)


def _reading(config: Config, facts: Facts, speeds: Speeds) -> float:
    """Estimate what every micro-batch costs, however small it is: weights are read, and gradients added to sums."""
    sizes = own_sizes_of(config, facts)
    moved = 3 * sizes.weights  # in forward, for the gradients of inputs, and as gradients of their own
    if config.accumulates and config.placement.gradients == "device":
        moved += 2 * sizes.gradients
    return moved / speeds.memory


def _together(computing: float, moved: Traffic, summing: float, speeds: Speeds) -> float:
    """Return the time of work that is done at once; a CPU sums and copies in the time that it could compute in."""
    link, disk = moved.link_seconds(speeds), moved.disk_seconds(speeds)
    return max(computing, link, summing, disk) if speeds.overlaps else max(computing + link + summing, disk)


def _summing_seconds(config: Config, facts: Facts, speeds: Speeds) -> float:
    """Estimate the sums of gradients that the host adds, one of each parameter and micro-batch."""
    if config.placement.gradients not in ("host", "disk"):
        return 0.0
    summed = own_sizes_of(config, facts).gradients // config.numerics.gradients.bytes
    return config.gradient_accumulation_steps * summed / speeds.sums


def _updating(config: Config, facts: Facts, speeds: Speeds) -> float:
    """Estimate clipping and the update of this rank's rows, wherever they come from."""
    sizes = own_sizes_of(config, facts)
    if speeds.updates is not None:
        return sizes.weights / config.numerics.weights.bytes / speeds.updates
    return (2 * sizes.weights + 2 * sizes.gradients + 2 * sizes.states) / speeds.memory
