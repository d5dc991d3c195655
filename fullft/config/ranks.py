"""Ranks: which of the processes that train one model together this one is, as whoever started them says.

Imports no torch: a run's options are checked before it is there. What ranks tell each other is in `fullft/ranks.py`.
"""

import os
from dataclasses import dataclass

# Set by `python train.py --gpus N`, by torchrun and by most schedulers. Source: PyTorch, "torchrun", environment.
_STARTED = {"rank": "RANK", "count": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "local_count": "LOCAL_WORLD_SIZE"}
# Set by srun for the tasks of a job step; a batch script by itself is no step. Source: Slurm, srun(1), environment.
_SLURM = {
    "rank": "SLURM_PROCID",
    "count": "SLURM_STEP_NUM_TASKS",
    "local_rank": "SLURM_LOCALID",
    "local_count": "SLURM_STEP_TASKS_PER_NODE",
}


@dataclass(frozen=True)
class Place:
    """This process among the ranks.

    Attributes:
        rank: from 0.
        count: of all ranks.
        local_rank: from 0, on this machine.
        local_count: ranks on this machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1


@dataclass(frozen=True)
class Group:
    """The ranks that share out one copy of a model among them, and this one of them.

    Attributes:
        index: this rank's, from 0.
        count: of ranks in the group.
        copies: how many such groups there are. Ranks with the same index hold the same rows.
    """

    index: int = 0
    count: int = 1
    copies: int = 1


def group_of(place: Place, shard: str, shard_nodes: int | None) -> Group:
    """Return the group that a rank shares a model with; groups are of consecutive ranks.

    Args:
        place: of the rank.
        shard: the option's word; with `none` each rank is a group of its own.
        shard_nodes: how many nodes a group spans; None for all.
    """
    count = place.count if shard_nodes is None else min(place.count, shard_nodes * place.local_count)
    if shard == "none":
        count = 1
    return Group(place.rank % count, count, place.count // count)


def find_place() -> Place:
    """Return this process's place; alone, it is the only rank."""
    for names in (_STARTED, _SLURM):
        # Slurm writes "8(x2)" for two machines with eight each, and "8,4" where they differ.
        found = {name: os.environ.get(variable, "").split("(")[0].split(",")[0] for name, variable in names.items()}
        if found["rank"].isdecimal() and found["count"].isdecimal() and int(found["count"]) > 1:
            return Place(**{name: int(value) for name, value in found.items() if value.isdecimal()})
    return Place()
