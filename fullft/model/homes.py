"""Homes: the arrays on the host or on disk that hold the weights of streamed decoder layers between uses."""

import torch
from transformers import PreTrainedModel

from fullft.model.parts import decoder_layers
from fullft.storage.tiers import Storage, fill, set_home


def move_layers_home(model: PreTrainedModel, tier: str, storage: Storage, with_values: bool = True) -> None:
    """Move the decoder layers' weights to a tier, and keep only their shapes on the device.

    Args:
        model: on any device.
        tier: `host` or `disk`.
        storage: makes the homes, each of its weight's dtype.
        with_values: whether to move the weights there; else the homes are left to be filled.

    Raises:
        ModelError: the model's decoder layers cannot be found.
        DiskError: the disk has no room for them.
    """
    zeros: dict[torch.dtype, torch.Tensor] = {}
    for parameter in decoder_layers(model).parameters():
        home = storage.zeros(tier, parameter.numel(), parameter.dtype)
        if with_values:
            fill(home, parameter.detach().cpu())
        set_home(parameter, home)
        if parameter.dtype not in zeros:
            zeros[parameter.dtype] = torch.zeros(1, dtype=parameter.dtype, device=storage.device)
        # A single number in the shape of the weight: everything that reads shapes goes on working.
        parameter.data = zeros[parameter.dtype].expand(parameter.shape)
