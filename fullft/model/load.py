"""Loading a model: in an explicit dtype, into the tiers where its weights live, tensor by tensor where needed.

Which model it is, and whether it can be trained, is decided in `source.py`.
"""

from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import logging as transformers_logging

from fullft.config.config import Config
from fullft.errors import ModelError
from fullft.hardware import available_host_bytes
from fullft.model.homes import move_layers_home
from fullft.model.load_rows import keeps_some_in_fp32, load_rows, reload_rows
from fullft.model.precision import dtype_of, split_into
from fullft.model.source import DEMO_MODEL, load_generation_config, loading
from fullft.model.stored import WIDER, StoredTensor, stored_tensors, under_names_of
from fullft.model.weight_files import require_trainable_numbers, safetensors_files
from fullft.ranks import is_first
from fullft.storage.tiers import Storage, fill, home_of, lives_elsewhere

_READ = 1 << 24  # bytes read at a time


def load_model(config: Config, source: str, storage: Storage) -> PreTrainedModel:
    """Load a model with every parameter trainable, in training mode.

    Under several ranks its parameters have no memory yet, and `storage.rows` holds this rank's rows of them.

    Args:
        config: number formats, placement, `trust_remote_code` and, for the demo's random weights, `seed` are read.
        source: folder or hub id. The demo's folder has a config alone, and gets random weights.
        storage: makes the homes of weights that do not live on the device.

    Raises:
        ModelError: weights are missing, damaged, or do not fit the config.
    """
    dtype = dtype_of(config.numerics.weights)
    with loading(source):
        model_config = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code)
        require_trainable_numbers(source, model_config)
        if config.gpus > 1:
            model = load_rows(config, source, storage, lambda dtype: _whole(config, source, dtype))
        elif source == str(DEMO_MODEL):
            model = _whole(config, source, dtype)
            if config.placement.streams_layers:
                move_layers_home(model, config.placement.parameters, storage)
        else:
            _read_through(safetensors_files(source))
            one_by_one = _one_by_one(config, source, dtype, storage)
            model = one_by_one or _from_pretrained(config, source, dtype)
            if config.numerics.splits and not one_by_one:
                _keep_remainders(config, model, source, storage)
    transformers_logging.disable_progress_bar()  # loading may show one; saving would tear ours
    if config.gpus == 1:
        model.to(storage.device)
    model.requires_grad_(True)
    model.train()
    return model


def _whole(config: Config, source: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load a whole model on the CPU."""
    if source != str(DEMO_MODEL):
        return _from_pretrained(config, source, dtype)
    torch.manual_seed(config.seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=dtype)
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


def _one_by_one(config: Config, source: str, dtype: torch.dtype, storage: Storage) -> PreTrainedModel | None:
    """Load a model whose layers are never in memory all at once, or one whose wide weights are split as they come.

    Returns:
        None where `from_pretrained` is as good, since nothing is to be split, or needed, since files and model differ.

    Raises:
        ModelError: the files' tensors are not the model's parameters one by one: transformers must convert them.
    """
    is_split, is_streamed = config.numerics.splits, config.placement.streams_layers
    tensors = stored_tensors(source) if is_streamed or is_split else {}
    if not is_streamed and not any(each.dtype in WIDER for each in tensors.values()):
        return None
    model_config = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    with no_init_weights():  # pages that are never written take no memory
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, trust_remote_code=config.trust_remote_code)
    model.tie_weights()
    stored = under_names_of(model, tensors)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if name in stored and stored[name].shape == list(parameter.shape):
            continue
        if not is_streamed:
            return None
        raise ModelError(
            f"the files of {source} have no tensor for {name} as it is: they must be converted while loading, "
            f"which takes all of the model at once: leave out parameters={config.placement.parameters}"
        )
    if is_streamed:
        move_layers_home(model, config.placement.parameters, storage, with_values=False)
    elif (
        stored.keys() != saved_tensors(model).keys()
        or len(stored) < len(tensors)
        or keeps_some_in_fp32(model)  # from_pretrained handles them
    ):
        return None
    targets = dict(model.named_buffers()) | parameters
    for name, each in sorted(stored.items(), key=lambda item: (item[1].file, item[1].name)):  # in the disk's order
        if is_split and each.dtype in WIDER and name in parameters and parameters[name].dtype == torch.bfloat16:
            _keep(parameters[name], each.read(), config.placement.optimizer, storage)
        else:
            fill(home_of(targets[name]), each.read().to(targets[name].dtype))
    load_generation_config(model, source)
    return model


def _keep_remainders(config: Config, model: PreTrainedModel, source: str, storage: Storage) -> None:
    """Where files hold wider weights, let the optimizer's masters start from these, not from their bf16 copies."""
    tier = config.placement.optimizer
    stored = under_names_of(model, stored_tensors(source))
    unknown: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.bfloat16:
            continue
        if name not in stored:
            unknown[name] = parameter
        elif stored[name].dtype in WIDER:
            _keep(parameter, stored[name].read(), tier, storage)
    if unknown and _is_wider(config, source, stored):  # transformers has converted what is in the files
        wide = dict(_from_pretrained(config, source, torch.float32).named_parameters())
        for name, parameter in unknown.items():
            _keep(parameter, wide.pop(name).detach(), tier, storage)


def _keep(parameter: nn.Parameter, values: torch.Tensor, tier: str, storage: Storage) -> None:
    """Split a wide tensor into a weight and the remainder that the optimizer will take."""
    remainders = storage.zeros(tier, values.numel(), torch.int16)
    split_into(home_of(parameter), remainders, values)
    storage.remainders[parameter] = remainders


def reload_weights(config: Config, model: PreTrainedModel, folder: Path) -> None:
    """Put weights that `save_weights` wrote into the model that they were saved from, wherever its weights live.

    Args:
        config: `trust_remote_code` is read.
        model: changed in place.
        folder: of its checkpoint.
    """
    if config.gpus > 1:
        return reload_rows(model, folder, lambda dtype: _from_pretrained(config, str(folder), dtype))
    targets, stored = saved_tensors(model), stored_tensors(str(folder))
    memory = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    # What is saved is the model's own memory, unless transformers has converted it.
    if all(lives_elsewhere(target) or target.untyped_storage().data_ptr() in memory for target in targets.values()):
        with torch.no_grad():
            for name, target in targets.items():
                if lives_elsewhere(target):
                    fill(home_of(target), stored[name].read())
                else:
                    target.copy_(stored[name].read())
        return
    weights = dict(_from_pretrained(config, str(folder), model.dtype).named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.pop(name))


def _is_wider(config: Config, source: str, stored: dict[str, StoredTensor]) -> bool:
    if stored:
        return any(each.dtype in WIDER for each in stored.values())
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


def saved_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return what `save_pretrained` writes: tied weights under one name, converted weights as the files had them.

    Every rank must call it if the model is sharded. Then weights that were converted while loading, such as fused
    experts, are gathered one by one, since only whole ones can be converted back: the first rank gets them in its
    host's memory, the others get tensors without bytes. All other weights stay sharded.

    Args:
        model: its weights may have homes elsewhere.
    """
    state = model.state_dict()
    if any(map(lives_elsewhere, model.parameters())):  # then it was loaded without conversions
        buffers = {name: buffer for name, buffer in model.named_buffers() if name in state}
        return dict(model.named_parameters()) | buffers
    ignored = model._keys_to_ignore_on_save or ()
    kept = {name: tensor for name, tensor in state.items() if name not in ignored}
    if any(isinstance(tensor, DTensor) for tensor in kept.values()):
        return _saved_shards(model, kept)
    return dict(revert_weight_conversion(model, remove_tied_weights_from_state_dict(kept, model)))


def _saved_shards(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # Names and shapes come from tensors without bytes: shards may be empty, and tell nothing of what is tied.
    shapes = {name: torch.empty(each.shape, dtype=each.dtype, device="meta") for name, each in state.items()}
    shapes = remove_tied_weights_from_state_dict(shapes, model)
    names = {id(shape): name for name, shape in shapes.items()}
    saved = dict(revert_weight_conversion(model, dict(shapes)))
    unchanged = {names[id(shape)] for shape in saved.values() if id(shape) in names}
    whole = {name: _gather(state[name], shapes[name]) for name in sorted(shapes.keys() - unchanged)}
    converted = revert_weight_conversion(model, whole) if whole else {}
    return {name: state[names[id(shape)]] if id(shape) in names else converted[name] for name, shape in saved.items()}


def _gather(tensor: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    """Return a whole tensor on the first rank's CPU, and on other ranks one without bytes."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.to("cpu", copy=True) if is_first() else shape  # a copy has no padding, which would count as its size
