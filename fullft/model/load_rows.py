"""Loading for several ranks: each reads its own rows of the files, and none ever holds the whole model.

The parameters come without memory. `transforms/sharding.py` gives them the rows that are left in `storage.rows`.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from fullft.config.config import Config
from fullft.errors import ModelError
from fullft.model.precision import dtype_of, split_into
from fullft.model.source import DEMO_MODEL, load_generation_config
from fullft.model.stored import WIDER, stored_tensors, under_names_of
from fullft.model.weight_files import safetensors_files
from fullft.ranks import first_on_this_machine, in_turn
from fullft.storage.tiers import Storage, first_row, local_of, row_range


class _Readable(Protocol):
    """A tensor that can be read, also by rows."""

    def read(self) -> torch.Tensor: ...
    def read_rows(self, start: int, end: int) -> torch.Tensor: ...


class _Whole:
    """A tensor that is in memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor.detach()

    def read(self) -> torch.Tensor:
        return self._tensor

    def read_rows(self, start: int, end: int) -> torch.Tensor:
        return self._tensor[start:end]


def load_rows(
    config: Config, source: str, storage: Storage, load_whole: Callable[[torch.dtype], PreTrainedModel]
) -> PreTrainedModel:
    """Build a model whose parameters have no memory, and read this rank's rows of them.

    Where the files do not hold the parameters one by one, as those of mixtures of experts, transformers must convert
    them. Then the ranks of a machine, one after the other, load the whole model into the host's memory, and keep their
    rows.

    Args:
        config: number formats, placement, ranks and `trust_remote_code` are read.
        source: folder or hub id.
        storage: gets the rows, and the remainders of split masters.
        load_whole: loads the whole model on the CPU.

    Raises:
        ModelError: the family keeps some parameters in another dtype than the others, which cannot be sharded.
    """
    dtype = dtype_of(config.numerics.weights)
    model_config = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    with no_init_weights(), _parameters_without_memory():
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, trust_remote_code=config.trust_remote_code)
    model.tie_weights()
    if dtype == torch.bfloat16 and keeps_some_in_fp32(model):
        raise ModelError(
            f"{type(model).__name__} keeps some of its parameters in fp32, and ranks share parameters of one dtype: "
            "pass --precision bf16-mixed, or train it on one device"
        )
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(storage.device))
    is_demo = source == str(DEMO_MODEL)
    if not is_demo:
        first_on_this_machine(lambda: safetensors_files(source))  # which may download them
    if not is_demo and (stored := _one_by_one(source, model)) is not None:
        _keep_rows(model, stored, config, storage)
    else:  # the host may have room for one whole model, not for one of each rank
        is_wider = not is_demo and any(each.dtype in WIDER for each in stored_tensors(source).values())
        wide = torch.float32 if config.numerics.splits and is_wider else dtype
        in_turn(lambda: _keep_rows(model, _in_memory(load_whole(wide)), config, storage))
    load_generation_config(model, source)
    return model


def _keep_rows(model: PreTrainedModel, stored: Mapping[str, _Readable], config: Config, storage: Storage) -> None:
    """Copy this rank's rows of all parameters to `storage.rows`, and whole buffers into the model."""
    for name, parameter in model.named_parameters():
        rows = stored[name].read_rows(*row_range(len(parameter), config.group.index, config.group.count))
        storage.rows[parameter] = weights = torch.empty(rows.shape, dtype=parameter.dtype, device=storage.device)
        if config.numerics.splits and rows.dtype in (torch.float32, torch.float16):
            remainders = storage.zeros(config.placement.optimizer, rows.numel(), torch.int16)
            split_into(weights, remainders, rows)
            storage.remainders[parameter] = remainders
        else:
            weights.copy_(rows)
    for name, buffer in model.named_buffers():
        if name in stored:
            buffer.copy_(stored[name].read())


def keeps_some_in_fp32(model: PreTrainedModel) -> bool:
    """Return whether a family keeps some parameters in fp32, whatever the others have."""
    return bool(model._keep_in_fp32_modules_strict)


def reload_rows(model: PreTrainedModel, folder: Path, load_whole: Callable[[torch.dtype], PreTrainedModel]) -> None:
    """Put this rank's rows of weights that `save_weights` wrote into the model that they were saved from.

    Args:
        model: sharded; changed in place.
        folder: of its checkpoint.
        load_whole: loads the whole model on the CPU.
    """

    def fill(stored: Mapping[str, _Readable]) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                rows, start = local_of(parameter), first_row(parameter)
                rows.copy_(stored[name].read_rows(start, start + len(rows)))

    if (stored := _one_by_one(str(folder), model)) is not None:
        fill(stored)
    else:
        in_turn(lambda: fill(_in_memory(load_whole(model.dtype))))


def holds_rows(model: PreTrainedModel, folder: Path) -> bool | None:
    """Return whether written files hold exactly this rank's rows; None where their tensors are converted ones.

    Args:
        model: sharded.
        folder: of the written model.
    """
    if (stored := _one_by_one(str(folder), model)) is None:
        return None
    for name, parameter in model.named_parameters():
        rows, start = local_of(parameter).detach(), first_row(parameter)
        if not torch.equal(rows.cpu(), stored[name].read_rows(start, start + len(rows))):
            return False
    return True


def _one_by_one(source: str, model: PreTrainedModel) -> Mapping[str, _Readable] | None:
    """Return the files' tensors under the model's names; None if they are not the parameters one by one."""
    tensors = stored_tensors(source)
    stored = under_names_of(model, tensors)
    if any(name not in stored or stored[name].shape != list(each.shape) for name, each in model.named_parameters()):
        return None
    ignored = "|".join(model._keys_to_ignore_on_load_unexpected or ()) or "$."  # as from_pretrained does
    extra = tensors.keys() - {each.name for each in stored.values()}
    if unexpected := [name for name in extra if not re.search(ignored, name)]:
        print(
            f"warning: {source} has {len(unexpected)} tensors that its config.json has no place for, such as "
            f"{min(unexpected)}"
        )
    return stored


def _in_memory(model: PreTrainedModel) -> Mapping[str, _Readable]:
    return {name: _Whole(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Put parameters on the `meta` device when a module registers them; buffers are as real as ever.

    What buffers hold is often in no file, but computed when a model is built.
    """
    register = nn.Module.register_parameter

    def without_memory(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, None if param is None else nn.Parameter(param.detach().to("meta"), param.requires_grad))

    nn.Module.register_parameter = without_memory  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
