"""Weights in and out: loaded in an explicit dtype to where they are to live, saved as `save_pretrained` lays them out.

Owns reading and writing them, one at a time where the whole model would not fit. Which model it is, and whether it can
be trained, is `find.py`'s business.
"""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils import logging as transformers_logging

from fullft.config.config import Config, parse_offload
from fullft.errors import ModelError
from fullft.memory.machine import available_host_bytes
from fullft.model.parts import PRECISIONS
from fullft.model.precision import split
from fullft.model.source import DEMO_MODEL, loading
from fullft.optim.build import placement_of
from fullft.saving.files import write_tensors, write_text
from fullft.storage.tiers import Storage, fill, home_of
from fullft.transforms.streaming import settle_layers

MAX_SHARD_SIZE = "5GB"
_PIECE = 1 << 20  # elements split at a time
_READ = 1 << 24  # bytes read at a time

# ---------------------------------------------------------------------------------------------- in


def load_model(config: Config, source: str, storage: Storage) -> PreTrainedModel:
    """Load a model with every parameter trainable, in training mode.

    Args:
        config: `precision`, `master_weights`, `offload`, `trust_remote_code` and, for the demo's random weights, `seed`
            count.
        source: folder or hub id; the demo's folder has a config alone, and gets random weights.
        storage: makes the homes of weights that do not live on the device.

    Raises:
        ModelError: weights are missing, damaged, or do not fit the config.
    """
    dtype, tier = PRECISIONS[config.precision].weights, parse_offload(config.offload).get("parameters")
    is_split = config.precision == "bf16-true" and config.master_weights == "split"
    with loading(source):
        if source == str(DEMO_MODEL):
            torch.manual_seed(config.seed)
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=dtype)
            if tier:
                settle_layers(model, tier, storage)
        else:
            _read_through(_weight_files(source))
            one_by_one = _one_by_one(config, source, dtype, tier, is_split, storage)
            model = one_by_one or _from_pretrained(config, source, dtype)
            if is_split and not one_by_one:
                _keep_what_bf16_rounds_away(config, model, source, storage)
    transformers_logging.disable_progress_bar()  # loading may show one; saving would tear ours
    model.to(storage.device)
    model.requires_grad_(True)
    model.train()
    return model


def _from_pretrained(config: Config, source: str, dtype: torch.dtype) -> PreTrainedModel:
    # dtype is always explicit: transformers 5 defaults to whatever the file holds. Attention is left to its default:
    # torch's scaled_dot_product_attention, or eager for the few families whose scores that cannot express (Gemma-2).
    model, loaded = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=dtype,
        trust_remote_code=config.trust_remote_code,
        ignore_mismatched_sizes=True,  # so that they are reported rather than raised, and refused below
        output_loading_info=True,
    )
    for problem, names in (
        ("lack", loaded["missing_keys"]),  # they would be trained from random values
        ("have the wrong shape in", [mismatch[0] for mismatch in loaded["mismatched_keys"]]),
    ):
        if names:
            raise ModelError(
                f"the weights of {source} {problem} {len(names)} tensors, such as {min(names)}: they do not belong to "
                "its config.json; download the model again, completely"
            )
    if extra := loaded["unexpected_keys"]:
        print(f"warning: {source} has {len(extra)} tensors that its config.json has no place for, such as {min(extra)}")
    return model


def _one_by_one(
    config: Config, source: str, dtype: torch.dtype, tier: str | None, is_split: bool, storage: Storage
) -> PreTrainedModel | None:
    """Load a model whose layers are never in memory all at once, or one whose wide weights are split as they come.

    Returns:
        None where `from_pretrained` is as good, since nothing is to be split, or needed, since files and model differ.

    Raises:
        ModelError: the files' tensors are not the model's parameters one by one: transformers must convert them.
    """
    tensors = _tensors(source) if tier or is_split else {}
    if not tier and not any(each.dtype in _WIDER for each in tensors.values()):
        return None
    model_config = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    with no_init_weights():  # memory that nobody writes to takes none
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, trust_remote_code=config.trust_remote_code)
    model.tie_weights()
    stored = _stored(tensors, model)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if name in stored and stored[name].shape == list(parameter.shape):
            continue
        if not tier:
            return None
        raise ModelError(
            f"the files of {source} have no tensor for {name} as it is: they must be converted while loading, "
            f"which takes all of the model at once: leave out parameters={tier}"
        )
    if tier:
        settle_layers(model, tier, storage, with_values=False)
    elif (
        stored.keys() != _saved_tensors(model).keys()
        or len(stored) < len(tensors)
        or model._keep_in_fp32_modules_strict  # which from_pretrained knows of
    ):
        return None
    targets = dict(model.named_buffers()) | parameters
    for name, each in sorted(stored.items(), key=lambda item: (item[1].file, item[1].name)):  # as the disk has them
        if is_split and each.dtype in _WIDER and name in parameters and parameters[name].dtype == torch.bfloat16:
            _keep(parameters[name], each.read(), placement_of(config).optimizer, storage)
        else:
            fill(home_of(targets[name]), each.read().to(targets[name].dtype))
    if model.can_generate():
        with suppress(OSError):  # there need not be one
            model.generation_config = GenerationConfig.from_pretrained(source)
    return model


def _keep_what_bf16_rounds_away(config: Config, model: PreTrainedModel, source: str, storage: Storage) -> None:
    """Where files hold wider weights, let the optimizer's masters start from these, not from their bf16 copies."""
    tier = placement_of(config).optimizer
    stored = _stored(_tensors(source), model)
    unknown: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.bfloat16:
            continue
        if name not in stored:
            unknown[name] = parameter
        elif stored[name].dtype in _WIDER:
            _keep(parameter, stored[name].read(), tier, storage)
    if unknown and _is_wider(config, source, stored):  # transformers has converted what is in the files
        wide = dict(_from_pretrained(config, source, torch.float32).named_parameters())
        for name, parameter in unknown.items():
            _keep(parameter, wide.pop(name).detach(), tier, storage)


def _keep(parameter: nn.Parameter, values: torch.Tensor, tier: str, storage: Storage) -> None:
    rounded_off = storage.zeros(tier, values.numel(), torch.int16)
    # In pieces, whose copies stay in the processor's cache: new memory for whole tensors would cost more than reading.
    for number, piece in enumerate(values.flatten().split(_PIECE)):
        master = piece.to(torch.float32, copy=True)
        weights, remainder = torch.empty_like(piece, dtype=torch.bfloat16), torch.empty_like(piece, dtype=torch.int16)
        split(master, weights, remainder)
        fill(home_of(parameter), weights, number * _PIECE)
        fill(rounded_off, remainder, number * _PIECE)
    parameter.rounded_off = rounded_off  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------------- files

_WIDER = ("F32", "F16")  # than bf16, in range or in precision


@dataclass(frozen=True)
class _Stored:
    """A tensor in a safetensors file."""

    file: Path
    name: str
    dtype: str
    shape: list[int]
    tensors: Any  # the file, open

    def read(self) -> torch.Tensor:
        tensor: torch.Tensor = self.tensors.get_tensor(self.name)  # mapped: nothing is read until somebody looks
        return tensor


def _tensors(source: str) -> dict[str, _Stored]:
    """List the tensors of the safetensors files under the names that they have there."""
    found = {}
    for file in _weight_files(source):
        tensors: Any = safe_open(file, framework="pt", device="cpu")
        for name in tensors.keys():  # noqa: SIM118 (no mapping)
            part = tensors.get_slice(name)
            found[name] = _Stored(file, name, str(part.get_dtype()), list(part.get_shape()), tensors)
    return found


def _stored(found: dict[str, _Stored], model: PreTrainedModel) -> dict[str, _Stored]:
    """Give tensors of files under the model's names; files of a base model lack its prefix."""
    prefix = f"{model.base_model_prefix}."
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    known = {name: name if name in found else name.removeprefix(prefix) for name in names}
    return {name: found[there] for name, there in known.items() if there in found}


def _weight_files(source: str) -> list[Path]:
    """List the safetensors files that transformers loads, those of a hub id from its cache; none for other formats."""

    def find(name: str) -> Path | None:
        file = cached_file(
            source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        return None if file is None else Path(file)

    if (single := find(SAFE_WEIGHTS_NAME)) is not None:
        return [single]
    if (index := find(SAFE_WEIGHTS_INDEX_NAME)) is None:
        return []
    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return [file for shard in shards if (file := find(shard)) is not None]


def _is_wider(config: Config, source: str, stored: dict[str, _Stored]) -> bool:
    if stored:
        return any(each.dtype in _WIDER for each in stored.values())
    model_config = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    return model_config.dtype in (torch.float32, torch.float16)


def _read_through(files: list[Path]) -> None:
    """Bring files into the page cache, in order: mapped, they would come page by page, at half the disk's speed."""
    if sum(file.stat().st_size for file in files) > available_host_bytes():
        return  # the last ones would push the first ones out again
    memory = bytearray(_READ)
    for file in files:
        with file.open("rb", buffering=0) as content:
            while content.readinto(memory):
                pass


# ---------------------------------------------------------------------------------------------- out


def save_weights(model: PreTrainedModel, folder: Path, is_hashed: bool = True) -> dict[str, str]:
    """Write weights and configs as `save_pretrained` does, faster, and also where the layers are not on the device.

    Args:
        model: whose weights may have homes elsewhere.
        folder: exists.
        is_hashed: whether the files' sha256 are wanted.

    Returns:
        The sha256 of each file of weights, under its name; empty ones if nobody wants them.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    model.save_pretrained(folder, state_dict={})  # all but the weights: configs, and the code that came with the model
    tensors = _saved_tensors(model)
    away = {name: tensor for name, tensor in tensors.items() if home_of(tensor) is not tensor}
    meta = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in away.items()}
    plan = split_torch_state_dict_into_shards(tensors | meta, max_shard_size=MAX_SHARD_SIZE)
    digests = {}
    for file, names in plan.filename_to_tensors.items():
        homes = {name: home_of(tensors[name]) for name in names}
        shapes = {name: tensors[name].shape for name in names}
        digests[file] = write_tensors(folder / file, homes, shapes, is_hashed)
    if plan.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **plan.metadata}
        index = {"metadata": metadata, "weight_map": plan.tensor_to_filename}
        write_text(folder / SAFE_WEIGHTS_INDEX_NAME, json.dumps(index, indent=2, sort_keys=True) + "\n")
    return digests


def _saved_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Give what `save_pretrained` writes: tied weights under one name, and what loading has converted as it was."""
    state = model.state_dict()
    if any(home_of(parameter) is not parameter for parameter in model.parameters()):  # loaded without conversions
        buffers = {name: buffer for name, buffer in model.named_buffers() if name in state}
        return dict(model.named_parameters()) | buffers
    ignored = model._keys_to_ignore_on_save or ()
    kept = {name: tensor for name, tensor in state.items() if name not in ignored}
    return dict(revert_weight_conversion(model, remove_tied_weights_from_state_dict(kept, model)))
