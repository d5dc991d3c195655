"""Ranks for a plan: a group of processes that has a size but no processes, and whose collectives move nothing."""

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.testing._internal.distributed.fake_pg import FakeStore

from fullft.config.config import Config

# Names of no other mesh: PyTorch caches what operators give on equal meshes, with the mesh in it, and a run would then
# send to ranks that are not there.
_NUMBERS = itertools.count()
_CUT = "_chunk_with_empty"  # what FSDP cuts a weight with


@contextmanager
def planned_ranks(config: Config) -> Iterator[DeviceMesh | None]:
    """Arrange ranks as `make_mesh` does. Each one has as many rows as the first one, and none has more.

    In a run it may be called by one rank alone: the others do not notice.

    Args:
        config: how many ranks there are, and what they share.

    Yields:
        [copies, ranks of a group]; None for a run on one device.
    """
    if config.gpus == 1:
        yield None
        return
    has_ranks = dist.is_initialized()
    if not has_ranks:
        hook = sys.excepthook  # which is replaced by one that names the rank
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=config.gpus)
        sys.excepthook = hook
    group = config.group
    ranks = torch.arange(config.gpus).view(group.copies, group.count)
    copy, index = divmod(dist.get_rank(), group.count)
    members = [ranks[0]] if group.copies == 1 else [ranks[:, index], ranks[copy]]
    # Real groups are made by all ranks together. With local synchronisation it is up to those in the group, and fake
    # ones do not synchronise.
    groups = [dist.new_group(each.tolist(), backend="fake", use_local_synchronization=True) for each in members]
    whole_cut = getattr(_fsdp_param, _CUT)
    setattr(_fsdp_param, _CUT, _first_rows)
    try:
        mesh = ranks[0] if group.copies == 1 else ranks
        yield DeviceMesh.from_group(groups, "cpu", mesh=mesh, mesh_dim_names=_names()[-mesh.ndim :])
    finally:
        setattr(_fsdp_param, _CUT, whole_cut)
        for each in groups if has_ranks else [None]:
            dist.destroy_process_group(each)


def _names() -> tuple[str, str]:
    number = next(_NUMBERS)
    return f"planned copies {number}", f"planned ranks {number}"


def _first_rows(weight: torch.Tensor, count: int, dim: int) -> list[torch.Tensor]:
    """Cut the first rank's rows off, for all: FSDP would make as many fake tensors as there are ranks."""
    return [weight.narrow(dim, 0, -(-weight.shape[dim] // count))] * count
