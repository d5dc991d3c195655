"""Sharding: ZeRO-1, 2 and 3, hybrids of them, and plain data parallelism, all by one engine, FSDP2's `fully_shard`.

How it works: each rank keeps some rows of every parameter, with their gradients and optimizer states. A unit (a decoder
layer, an embedding, all the rest) is gathered before it computes; when backward has passed it, its gradients are summed
over the ranks, and each rank gets those of its rows. The stages differ in what happens between a step's micro-batches:

    --shard                  weights, between uses    gradients are summed over ranks
    none (DDP)               whole                    after the last micro-batch
    optimizer (ZeRO-1)       whole until the step     after the last micro-batch
    gradients (ZeRO-2)       whole until the step     after each micro-batch
    full (ZeRO-3)            this rank's rows         after each micro-batch

The loop does not know of this. It replaces PyTorch's `DistributedDataParallel` and `ZeroRedundancyOptimizer`, and the
engine of DeepSpeed. It must be applied after activation checkpointing and compilation: FSDP's hooks stay outside of a
layer's forward, so that recomputation finds gathered weights.

Source: Rajbhandari et al., "ZeRO" (2020), section 5; Zhao et al., "PyTorch FSDP" (2023), section 4.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fullft.config.config import Config
from fullft.errors import ModelError
from fullft.model.parts import decoder_layers, decoder_of
from fullft.model.precision import dtype_of
from fullft.storage.tiers import Storage

# It warns that the model's outputs are views, which must not be changed in place: nothing here does.
logging.getLogger("torch.distributed.fsdp").addFilter(lambda record: "view" not in record.getMessage())


def make_mesh(config: Config, device: torch.device) -> DeviceMesh:
    """Arrange the ranks: [copies, ranks of a group], or [ranks] where there is only one copy.

    Args:
        config: how many ranks there are, and what they share.
        device: that computes.
    """
    group = config.group
    if group.copies == 1:
        return init_device_mesh(device.type, (group.count,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (group.copies, group.count), mesh_dim_names=("replicate", "shard"))


def apply_sharding(model: PreTrainedModel, config: Config, storage: Storage, mesh: DeviceMesh | None = None) -> None:
    """Spread a model over the ranks; a run on one device is unchanged.

    Args:
        model: changed in place; its parameters become `DTensor`s. Those without memory (on the `meta` device) get this
            rank's rows, which loading has left in `storage`.
        config: its sharding and number formats are read.
        storage: where loading has left the rows.
        mesh: of the ranks; by default `make_mesh` makes it.

    Raises:
        ModelError: one unit holds parameters of several dtypes, or the decoder layers cannot be found.
    """
    if config.gpus == 1:
        return
    mesh = mesh or make_mesh(config, storage.device)
    _SHARDINGS[model] = Sharding(model, config, storage, mesh)


_SHARDINGS: "WeakKeyDictionary[nn.Module, Sharding]" = WeakKeyDictionary()


def sharding_of(model: PreTrainedModel) -> "Sharding | NoSharding":
    """Return how a model is called under its sharding; the null object where it has none."""
    return _SHARDINGS.get(model) or NoSharding(model)


class NoSharding:
    """A model that is not sharded: its decoder is called as it is, and nothing needs to be gathered.

    Args:
        model: any.

    Attributes:
        decoder: what comes before the head.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.decoder = decoder_of(model)

    def before_backward(self, is_last: bool) -> None:
        """Do nothing."""

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Do nothing."""
        yield


class _Root(nn.Module):
    """FSDP's outermost unit. It is outside of the model's own tree, so that the head's call meets no hook of FSDP.

    It owns what no other unit does: the last norm and the head, with tied embeddings. They stay gathered until backward
    is through, and the loss finds them as plain tensors.
    """

    def __init__(self, model: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._decoder = [decoder]  # not a child a second time

    def forward(self, **inputs: Any) -> Any:
        return self._decoder[0](**inputs)


class Sharding:
    """A model whose parameters are spread over the ranks.

    Args:
        model: changed in place.
        config: its sharding and number formats are read.
        storage: where loading has left this rank's rows.
        mesh: from `make_mesh`.

    Attributes:
        decoder: computes what the model's decoder does, and is called in its place.
    """

    def __init__(self, model: PreTrainedModel, config: Config, storage: Storage, mesh: DeviceMesh) -> None:
        self._stage = config.shard
        self._sums = torch.promote_types(model.dtype, dtype_of(config.numerics.gradients))
        options: dict[str, Any] = {
            "mesh": mesh,
            # Weights are sent as they are; gradients are summed in the dtype that the optimizer reads.
            "mp_policy": MixedPrecisionPolicy(reduce_dtype=self._sums, cast_forward_inputs=False),
        }
        is_full, unsharded = config.shard == "full", dict(model.named_parameters())
        for layer in decoder_layers(model):
            fully_shard(layer, reshard_after_forward=is_full, **options)
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        if head is None or embeddings.weight is not head.weight:
            fully_shard(embeddings, reshard_after_forward=is_full, **options)
            embeddings.set_unshard_in_backward(False)  # its gradient needs no weights
        self.decoder = _Root(model, decoder_of(model))
        self._root = fully_shard(self.decoder, reshard_after_forward=False, **options)
        self._units = [module for module in self.decoder.modules() if isinstance(module, FSDPModule)]
        _put_rows_in_place(model, unsharded, storage)
        self._settle()

    def _settle(self) -> None:
        try:
            self._root._get_fsdp_state()._lazy_init()
        except AssertionError as error:
            raise ModelError(f"the model cannot be sharded: {error}") from error
        for unit in self._units:
            # Gradients are sums over all target tokens of the step already: nothing is to be divided by ranks.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
            # A rank whose micro-batch has no targets sends zeros, rather than leave the others waiting.
            unit.set_reduce_scatter_unused_params(True)
            for group in unit._get_fsdp_state()._fsdp_param_groups:
                for each in group.fsdp_params:
                    each.sharded_param.grad_dtype = self._sums

    def before_backward(self, is_last: bool) -> None:
        """Tell FSDP what backward is about to do.

        Args:
            is_last: whether it is this rank's last micro-batch of the step.
        """
        for unit in self._units:  # each time, as whatever gathers weights by hand undoes it
            for group in unit._get_fsdp_state()._fsdp_param_groups:
                group._orig_dtype = self._sums  # else sums are rounded to the weights' dtype (PyTorch issue 197203)
        if self._stage != "full":
            self._root.set_reshard_after_backward(is_last)
            self._root.set_requires_gradient_sync(is_last or self._stage == "gradients")

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Let the model be called by itself: what the root owns is here, and layers come when they are called.

        Afterwards every rank has its rows alone, whoever has gathered the others.
        """
        self._root.unshard()
        try:
            yield
        finally:
            for unit in self._units:
                unit.reshard()


def _put_rows_in_place(model: nn.Module, unsharded: dict[str, nn.Parameter], storage: Storage) -> None:
    """Give parameters without memory the rows, and the remainders of masters, that loading has read for this rank.

    Args:
        model: sharded.
        unsharded: its parameters before that, by name, under which loading has left them.
        storage: where they are.
    """
    owners: dict[nn.Parameter | None, list[tuple[nn.Module, str]]] = {}  # several where weights are tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            owners.setdefault(parameter, []).append((module, name))
    for name, parameter in list(model.named_parameters()):
        rows = storage.rows.pop(unsharded[name], None)
        if rows is None or not isinstance(parameter, DTensor):
            continue
        mesh, placements, shape, stride = (
            parameter.device_mesh,
            parameter.placements,
            parameter.shape,
            parameter.stride(),
        )
        local = rows.to(storage.device)
        filled = nn.Parameter(DTensor.from_local(local, mesh, placements, shape=shape, stride=stride))
        for module, place in owners[parameter]:
            module._parameters[place] = filled
        if (remainder := storage.remainders.pop(unsharded[name], None)) is not None:
            storage.remainders[filled] = remainder
