"""Communication: what ranks send to each other in a step, and the seconds that it takes, by arithmetic alone.

The tracker counts as much. Here nothing is traced, so that stages of sharding can be ranked.
"""

from fullft.config.config import Config
from fullft.memory.collectives import Sent
from fullft.memory.facts import Facts
from fullft.memory.speeds import Speeds
from fullft.memory.traffic import sizes_of


def estimate_sent(config: Config, facts: Facts, *, is_first: bool, is_last: bool) -> tuple[Sent, Sent]:
    """Return what a rank sends in a micro-batch's forward, and in its backward.

    With weights of w bytes, w' of them in the layers, and their gradients' sums of g bytes, on W ranks:

    - `full` gathers w in forward and w' in backward, `optimizer` and `gradients` w in the first forward alone
    - `optimizer` reduces g after the last micro-batch, `gradients` and `full` after each
    - copies sum g / W after the last one; `none` has W = 1, and nothing but copies

    To gather or reduce n bytes over W ranks each one sends n (W - 1) / W, and twice as much to sum them for all.

    Args:
        config: its number formats and ranks are read.
        facts: of the model.
        is_first: whether it is the step's first micro-batch.
        is_last: whether it is the step's last.

    Source: Rajbhandari et al., "ZeRO" (2020), section 7.
    """
    sizes, group, is_full = sizes_of(config, facts), config.group, config.shard == "full"

    def around(size: int, count: int) -> int:
        return (count - 1) * size // count

    gathered = around(sizes.weights, group.count) if is_full or is_first else 0
    again = around(sizes.layer_weights, group.count) if is_full else 0
    sums = sizes.gradients if is_last or config.shard in ("gradients", "full") else 0
    copied = 2 * around(sizes.gradients // group.count, group.copies) if is_last else 0
    backward = Sent(again, around(sums, group.count), copied)
    return Sent(gathered), backward


def seconds_with_others(config: Config, facts: Facts, forward: float, backward: float, speeds: Speeds) -> float:
    """Estimate the time of a step's micro-batches on several ranks.

    Layers are gathered, and their gradients sent, while other layers compute. Nothing computes while the rest comes
    (embeddings, last norm and head, in forward), or goes (in backward).

    Args:
        config: its number formats and ranks are read.
        facts: of the model.
        forward: time of a micro-batch's computing there.
        backward: time of its computing there.
        speeds: of the machine.
    """
    sizes, accumulation = sizes_of(config, facts), config.gradient_accumulation_steps
    alone = 1 - sizes.layer_weights / sizes.weights if speeds.overlaps else 1.0
    total = 0.0
    for times, is_first, is_last in _turns(accumulation):
        for computing, sent in zip(
            (forward, backward), estimate_sent(config, facts, is_first=is_first, is_last=is_last), strict=True
        ):
            sending = seconds_to_send(sent, config, speeds)
            total += times * (max(computing, (1 - alone) * sending) + alone * sending)
    if config.shard in ("none", "optimizer") and accumulation > 1:  # whole gradients, added up in memory
        total += accumulation * (sizes.weights + 2 * sizes.gradients) / speeds.memory
    return total


def _turns(accumulation: int) -> list[tuple[int, bool, bool]]:
    """Return how many micro-batches there are that are the step's first one, or its last one, or neither."""
    if accumulation == 1:
        return [(1, True, True)]
    return [(1, True, False), (accumulation - 2, False, False), (1, False, True)]


def seconds_to_send(sent: Sent, config: Config, speeds: Speeds) -> float:
    """Return how long collectives take.

    A ring through several machines crosses between two of them on as many network cards as these have ranks. The copies
    of a hybrid have one ring for each of these cards.

    Args:
        sent: by each rank.
        config: its ranks are read.
        speeds: of the machine.
    """
    place, group = config.place, config.group
    through_all = min(speeds.interconnect, speeds.network * place.local_count)
    shared = speeds.interconnect if group.count <= place.local_count else through_all
    copied = speeds.network if group.count > 1 else speeds.interconnect if place.machines == 1 else through_all
    return (sent.all_gather + sent.reduce_scatter) / shared + sent.all_reduce / copied
