"""Weights in and out: loaded in an explicit dtype to where they are to live, saved as `save_pretrained` lays them out.

Owns reading and writing them, one at a time where the whole model would not fit. Which model it is, and whether it can
be trained, is `model.py`'s business.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from fullft.config import Config, parse_offload
from fullft.disk import write_tensors, write_text
from fullft.errors import ModelError
from fullft.layer_streaming import settle_layers
from fullft.master_weights import split
from fullft.model import DEMO_MODEL, PRECISIONS, decoder_layers, loading
from fullft.offload import Array, Storage, fill, home_of

MAX_SHARD_SIZE = "5GB"

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
    with loading(source):
        if source == str(DEMO_MODEL):
            torch.manual_seed(config.seed)
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=dtype)
        else:
            model = _layer_by_layer(config, source, dtype, tier, storage) if tier else None
            model = model or _from_pretrained(config, source, dtype)
        first = next(decoder_layers(model).parameters()) if tier else None
        if first is not None and home_of(first) is first:
            settle_layers(model, str(tier), storage)
        if config.precision == "bf16-true" and config.master_weights == "split" and source != str(DEMO_MODEL):
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


def _layer_by_layer(
    config: Config, source: str, dtype: torch.dtype, tier: str, storage: Storage
) -> PreTrainedModel | None:
    """Load a model whose layers never are in memory all at once.

    Returns:
        None where the file's tensors are not the model's parameters one by one: transformers must convert them.
    """
    model_config = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    files = _weight_files(source)
    shapes = {name: shape for file in files for name, shape in _shapes(file)}
    with no_init_weights():  # memory that nobody writes to takes none
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, trust_remote_code=config.trust_remote_code)
    model.tie_weights()
    if any(shapes.get(name) != list(parameter.shape) for name, parameter in model.named_parameters()):
        return None
    settle_layers(model, tier, storage, with_values=False)
    targets = {**dict(model.named_buffers()), **{name: home_of(p) for name, p in model.named_parameters()}}
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                if name in targets:
                    fill(targets[name], tensors.get_tensor(name).to(targets[name].dtype))
    if model.can_generate() and (Path(files[0]).parent / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(Path(files[0]).parent)
    return model


def _keep_what_bf16_rounds_away(config: Config, model: PreTrainedModel, source: str, storage: Storage) -> None:
    """Where a file holds fp32 weights, let the optimizer's masters start from these, not from their bf16 copies."""
    tier = parse_offload(config.offload).get("optimizer", "device")
    parameters = dict(model.named_parameters())
    for file in _weight_files(source):
        with safe_open(file, framework="pt", device="cpu") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                parameter = parameters.get(name)
                if parameter is None or parameter.dtype != torch.bfloat16 or _dtype(tensors, name) != "F32":
                    continue
                master = tensors.get_tensor(name).flatten().clone()
                weights = torch.empty_like(master, dtype=torch.bfloat16)
                remainder = torch.empty_like(master, dtype=torch.int16)
                split(master, weights, remainder)
                fill(home_of(parameter), weights)
                rounded_off = storage.zeros(tier, remainder.numel(), torch.int16)
                fill(rounded_off, remainder)
                parameter.rounded_off = rounded_off


def _dtype(tensors: safe_open, name: str) -> str:
    return str(tensors.get_slice(name).get_dtype())  # type: ignore[no-untyped-call]


def _shapes(file: Path) -> Iterable[tuple[str, list[int]]]:
    with safe_open(file, framework="pt", device="cpu") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (no mapping)
            yield name, tensors.get_slice(name).get_shape()


def _weight_files(source: str) -> list[Path]:
    """List a model's safetensors files; those of a hub id are downloaded if need be."""
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    return sorted(folder.glob("model*.safetensors"))


# ---------------------------------------------------------------------------------------------- out


def save_weights(model: PreTrainedModel, folder: Path) -> None:
    """Write weights and configs as `save_pretrained` does, also where the layers are not on the device.

    Args:
        model: whose weights may have homes elsewhere.
        folder: exists.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    homes = {name: home_of(parameter) for name, parameter in model.named_parameters()}
    if all(home is parameter for home, parameter in zip(homes.values(), model.parameters(), strict=True)):
        model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
        return
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    tensors = _without_tied(model, homes)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    meta = {name: torch.empty(shapes[name], dtype=array.dtype, device="meta") for name, array in tensors.items()}
    plan = split_torch_state_dict_into_shards(meta, max_shard_size=MAX_SHARD_SIZE)
    for file, names in plan.filename_to_tensors.items():
        write_tensors(folder / file, {name: tensors[name] for name in names}, shapes)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=1))


def _without_tied(model: PreTrainedModel, homes: dict[str, Array]) -> dict[str, Array]:
    """Add persistent buffers to the parameters, among which tied ones stand under one name."""
    saved = model.state_dict().keys()
    return homes | {name: buffer for name, buffer in model.named_buffers() if name in saved}
