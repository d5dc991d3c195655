"""Weights on disk: written as `save_pretrained` lays them out, one tensor at a time, wherever they live."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from fullft.model.load import saved_tensors
from fullft.ranks import by_first_rank
from fullft.saving.files import write_text
from fullft.saving.tensors import stretch_of, write_tensors
from fullft.storage.tiers import lives_elsewhere

MAX_SHARD_SIZE = "5GB"


def save_weights(model: PreTrainedModel, folder: Path, is_hashed: bool = True) -> dict[str, str]:
    """Write weights and configs as `save_pretrained` does, faster, and also where the layers are not on the device.

    Every rank calls it, and writes what it holds.

    Args:
        model: its weights may have homes elsewhere, and may be sharded.
        folder: exists.
        is_hashed: whether the files' sha256 are wanted.

    Returns:
        The sha256 of each file of weights, under its name; empty where they are not wanted.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    # All but the weights: configs, and the code that came with the model.
    by_first_rank(lambda: model.save_pretrained(folder, state_dict={}))
    tensors = saved_tensors(model)
    plan = by_first_rank(lambda: _files_of(tensors))  # the others need not have the tensors that it goes by
    files = {
        folder / file: {name: stretch_of(tensors[name]) for name in names}
        for file, names in plan.filename_to_tensors.items()
    }
    digests = write_tensors(files, is_hashed)
    if plan.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **plan.metadata}
        index = {"metadata": metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        by_first_rank(lambda: write_text(folder / SAFE_WEIGHTS_INDEX_NAME, text))
    return digests


def _files_of(tensors: Mapping[str, torch.Tensor]) -> StateDictSplit:
    """Decide which tensors go into which file."""
    # What shares memory goes into one file; a size is that of the whole tensor.
    alone = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in tensors.items()
        if lives_elsewhere(tensor) or isinstance(tensor, DTensor)
    }
    return split_torch_state_dict_into_shards({**tensors, **alone}, max_shard_size=MAX_SHARD_SIZE)
