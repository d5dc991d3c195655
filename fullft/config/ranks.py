"""Ranks: which of the processes that train one model together this one is, as torchrun, Slurm or we ourselves say.

Imports no torch: a run's options are checked before it is there. How ranks meet is in `fullft/run/joining.py`.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from fullft.errors import OptionsError

# Set by `python train.py --gpus N`, by torchrun and by most schedulers. Source: PyTorch, "torchrun", environment.
_STARTED = {"rank": "RANK", "count": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "local_count": "LOCAL_WORLD_SIZE"}
# Set by srun for the tasks of a job step; a batch script by itself is no step. Source: Slurm, srun(1), environment.
_SLURM = {
    "rank": "SLURM_PROCID",
    "count": "SLURM_STEP_NUM_TASKS",
    "local_rank": "SLURM_LOCALID",
    "local_count": "SLURM_STEP_TASKS_PER_NODE",
}
LAUNCHER = "FULLFT_LAUNCHER"  # set for ranks that `--gpus N` has started: the process that did


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

    @property
    def machines(self) -> int:
        """The number of machines, if each has as many ranks as this one."""
        return -(-self.count // self.local_count)


ALONE = Place()


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
    slurm = _read(_SLURM)
    for found in (_read(_STARTED), slurm):
        if "rank" in found and found.get("count", 1) > 1:
            # Many Slurm scripts export only the first two of torchrun's variables.
            is_same = all(slurm.get(name) == found[name] for name in ("rank", "count"))
            return Place(**((slurm if is_same else {}) | found))
    return ALONE


def _read(variables: Mapping[str, str]) -> dict[str, int]:
    """Read the fields of a `Place` that the environment has."""
    words = {name: os.environ.get(variables[name], "") for name in (field.name for field in fields(Place))}
    if variables is _SLURM:
        words["local_count"] = _on_this_node(words["local_count"], os.environ.get("SLURM_NODEID", "0"))
    return {name: int(word) for name, word in words.items() if word.isdecimal()}


def _on_this_node(tasks: str, node: str) -> str:
    """Read Slurm's number of tasks per node: "8(x2),4" is 8 on the first two nodes and 4 on the third."""
    counts: list[str] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        counts += [count] * int(times or 1)
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else ""


def find_meeting_point() -> tuple[str, int]:
    """Return the address and the port at which rank 0 waits for the others.

    Raises:
        OptionsError: nothing says where that is.
    """
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    job, nodes = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_STEP_NODELIST", "")
    if job.isdecimal():
        address = address or first_host(nodes or os.environ.get("SLURM_JOB_NODELIST", ""))
        # The same on all nodes, another one for another job or step, and below the ports that systems hand out.
        step = os.environ.get("SLURM_STEP_ID", "")
        port = port or str(10_000 + (31 * int(job) + int(step if step.isdecimal() else 0)) % 20_000)
    if not address or not port:
        raise OptionsError(
            "RANK and WORLD_SIZE are set, but MASTER_ADDR and MASTER_PORT are not: set these to the address of rank "
            "0's machine and a free port there, or let --gpus N or torchrun start the ranks"
        )
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise OptionsError(f"MASTER_PORT {port!r} is not a port: set it to a number from 1 to 65535")
    return address, int(port)


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm list of nodes, as "node03" of "node[03-07,12],other1"."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)
