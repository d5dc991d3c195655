"""Sharding: ZeRO-1, 2 and 3, their hybrids, and plain data parallelism, by one engine, FSDP2's `fully_shard`.

How it works: each rank keeps some rows of every parameter, with their gradients and optimizer states. A unit (a decoder
layer, an embedding, all the rest) is gathered before it computes. When backward is through with it, its gradients are
summed over the ranks, and each gets those of its rows. The stages differ in what is kept between micro-batches:

    --shard                  whole weights stay          gradients are summed over ranks
    none (DDP)               until the step, and after   after the last micro-batch
    optimizer (ZeRO-1)       until the step              after the last micro-batch
    gradients (ZeRO-2)       until the step              after each micro-batch
    full (ZeRO-3)            while they are used         after each micro-batch

It replaces `DistributedDataParallel`, `ZeroRedundancyOptimizer` and DeepSpeed's engine. It must be applied after
activation checkpointing and compilation: FSDP's hooks stay outside of a layer's forward, so that recomputation finds
gathered weights.

Source: Rajbhandari et al., "ZeRO" (2020), section 5; Zhao et al., "PyTorch FSDP" (2023), section 4.
"""

import warnings
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
from fullft.model.parts import decoder_layers, decoder_of, replace_parameters
from fullft.model.precision import dtype_of
from fullft.storage.tiers import Storage, sharded_like

_SHARDINGS: "WeakKeyDictionary[nn.Module, Sharding]" = WeakKeyDictionary()


def apply_sharding(model: PreTrainedModel, config: Config, storage: Storage, mesh: DeviceMesh | None = None) -> None:
    """Spread a model over the ranks; one that is trained on one device is unchanged.

    Args:
        model: changed in place: its parameters become `DTensor`s. Those without memory (on the `meta` device) get this
            rank's rows, which loading has left in `storage`.
        config: its ranks, sharding and number formats are read.
        storage: where loading has left the rows.
        mesh: of the ranks; None makes one.

    Raises:
        ModelError: the decoder layers cannot be found, or FSDP refuses the model.
    """
    if config.gpus > 1:
        try:
            _SHARDINGS[model] = Sharding(model, config, storage, mesh or make_mesh(config, storage.device))
        except (AssertionError, ValueError, NotImplementedError) as error:  # FSDP's, of dtypes, scalars and layouts
            raise ModelError(f"{type(model).__name__} cannot be sharded: {error}") from error


def make_mesh(config: Config, device: torch.device) -> DeviceMesh:
    """Arrange the ranks: [copies, ranks that share one], or [ranks] where there is only one copy.

    Args:
        config: its ranks and sharding are read.
        device: that computes.
    """
    shape = (config.group.copies, config.group.count)
    if config.group.copies == 1:
        return init_device_mesh(device.type, shape[1:], mesh_dim_names=("shard",))
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def sharding_of(model: PreTrainedModel) -> "Sharding | NoSharding":
    """Return how a model must be called; the null object where it is not sharded."""
    return _SHARDINGS.get(model) or NoSharding(model)


class NoSharding:
    """A model that is not sharded: its decoder is called as it is, and nothing needs to be gathered.

    Attributes: as of `Sharding`.
    """

    gathers_each_time = False

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    @property
    def decoder(self) -> nn.Module:
        """The decoder, looked for when it is asked for, since that takes a call."""
        return decoder_of(self._model)

    def before_backward(self, is_last: bool) -> None:
        """Do nothing."""

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Do nothing."""
        yield


class _Root(nn.Module):
    """FSDP's outermost unit. It is outside of the model's own tree, so that the head's call meets no hook of FSDP.

    It owns what no other unit does: the last norm and the head, with tied embeddings. They stay gathered until backward
    is through with them, and the loss finds them as plain tensors.
    """

    def __init__(self, model: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._decoder = [decoder]  # not a child a second time

    def forward(self, **inputs: Any) -> Any:
        return self._decoder[0](**inputs)


class Sharding:
    """A model that is spread over the ranks. Its arguments are those of `apply_sharding`.

    Attributes:
        decoder: computes what the model's decoder does, and is called in its place.
        gathers_each_time: whether each call gathers the layers anew.
    """

    def __init__(self, model: PreTrainedModel, config: Config, storage: Storage, mesh: DeviceMesh) -> None:
        self._stage, unsharded = config.shard, dict(model.named_parameters())
        self.gathers_each_time = config.shard == "full"
        self._sums = torch.promote_types(model.dtype, dtype_of(config.numerics.gradients))
        # Weights are sent as they are; gradients are summed in the dtype that the optimizer reads.
        policy = MixedPrecisionPolicy(reduce_dtype=self._sums, cast_forward_inputs=False)
        options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
        for layer in decoder_layers(model):
            fully_shard(layer, reshard_after_forward=config.shard == "full", **options)
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        if head is None or embeddings.weight is not head.weight:
            fully_shard(embeddings, reshard_after_forward=config.shard == "full", **options)
            embeddings.set_unshard_in_backward(False)  # its gradient needs no weights
        self.decoder = _Root(model, decoder_of(model))
        self._root = fully_shard(self.decoder, reshard_after_forward=False, **options)
        self._units = [module for module in self.decoder.modules() if isinstance(module, FSDPModule)]
        _put_rows_in_place(model, unsharded, storage)
        self._root._get_fsdp_state()._lazy_init()  # now, since it may replace parameters
        for unit in self._units:
            # A gradient is a sum over the target tokens of all ranks: there is nothing to divide by.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
            # A rank whose micro-batch has no targets sends zeros, rather than leave the others waiting.
            unit.set_reduce_scatter_unused_params(True)
        for parameter in model.parameters():
            parameter.grad_dtype = self._sums
        # Such outputs must not be changed in place; nothing here does that.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")

    def before_backward(self, is_last: bool) -> None:
        """Tell FSDP what to keep, and what to send.

        Args:
            is_last: whether it is this rank's last micro-batch of the step.
        """
        for unit in self._units:  # each time, since whatever gathers weights by hand undoes it
            for group in unit._get_fsdp_state()._fsdp_param_groups:
                # Else sums are rounded to the dtype of the weights. Source: PyTorch issue 197203.
                group._orig_dtype = self._sums
        if self._stage != "full":
            self._root.set_reshard_after_backward(is_last)
            self._root.set_requires_gradient_sync(is_last or self._stage == "gradients")
        # Over copies, whose links are slow, the sum of a step goes once. Set after the above, which sets it too.
        self._root.set_requires_all_reduce(is_last)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Let the model be called by itself: what the root owns is here, and layers come when they are called.

        Afterwards each rank has its rows alone, whatever has been gathered within.
        """
        self._root.unshard()
        try:
            yield
        finally:
            # Besides, it forgets the order of a forward that no backward follows: the next backward would fetch a wrong
            # layer ahead.
            self._root.reset_iter_state()


def _put_rows_in_place(model: nn.Module, unsharded: dict[str, nn.Parameter], storage: Storage) -> None:
    """Fill parameters without memory with what loading has read for this rank, and left under the unsharded ones."""
    filled: dict[nn.Parameter, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and (rows := storage.rows.pop(unsharded[name], None)) is not None:
            filled[parameter] = nn.Parameter(sharded_like(parameter, rows))
            if (remainder := storage.remainders.pop(unsharded[name], None)) is not None:
                storage.remainders[filled[parameter]] = remainder
    replace_parameters(model, filled)
