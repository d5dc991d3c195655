"""Weights on disk: written as `save_pretrained` lays them out, one tensor at a time, wherever they live."""

import json
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from fullft.model.load import saved_tensors
from fullft.saving.files import write_tensors, write_text
from fullft.storage.tiers import home_of, lives_elsewhere

MAX_SHARD_SIZE = "5GB"


def save_weights(model: PreTrainedModel, folder: Path, is_hashed: bool = True) -> dict[str, str]:
    """Write weights and configs as `save_pretrained` does, faster, and also where the layers are not on the device.

    Args:
        model: its weights may have homes elsewhere.
        folder: exists.
        is_hashed: whether the files' sha256 are wanted.

    Returns:
        The sha256 of each file of weights, under its name; empty where they are not wanted.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    model.save_pretrained(folder, state_dict={})  # all but the weights: configs, and the code that came with the model
    tensors = saved_tensors(model)
    away = {name: tensor for name, tensor in tensors.items() if lives_elsewhere(tensor)}
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
