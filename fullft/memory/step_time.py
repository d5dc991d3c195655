"""The time of a step, estimated: computing, moving and sending, as far as they do not happen at once."""

from fullft.config.config import Config
from fullft.memory.communication import seconds_with_others
from fullft.memory.facts import Facts
from fullft.memory.machine import Speeds
from fullft.memory.traffic import estimate_traffic, own_sizes_of


def estimate_seconds(config: Config, facts: Facts, tokens: int, speeds: Speeds, recomputed: float) -> float:
    """Estimate a step's time: computing, or the traffic during it if that takes longer, and the traffic after it.

    Args:
        config: without any auto.
        facts: of the model.
        tokens: of a micro-batch.
        speeds: of the machine.
        recomputed: the time of recomputing, as a share of that of the forward pass.
    """
    forward = tokens * facts.flops_per_token / 3 / speeds.flops  # backward takes twice as long
    backward = (2 + recomputed) * forward
    during, after = estimate_traffic(config, facts)
    if config.gpus == 1:
        computing = config.gradient_accumulation_steps * (forward + backward)
        return max(computing, during.seconds(speeds)) + after.seconds(speeds)
    computing = seconds_with_others(config, facts, forward, backward, speeds)
    return max(computing, during.seconds(speeds)) + after.seconds(speeds) + _update_seconds(config, facts, speeds)


def _update_seconds(config: Config, facts: Facts, speeds: Speeds) -> float:
    """Estimate the update of what is on the device: ranks that share it save some of it."""
    sizes = own_sizes_of(config, facts)
    if config.placement.optimizer not in ("device", "paged"):
        return 0.0
    return (2 * sizes.weights + sizes.gradients + 2 * sizes.states) / speeds.memory
