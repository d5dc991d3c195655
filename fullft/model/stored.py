"""Tensors in safetensors files: listed by name without being read, and read whole or by rows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from fullft.model.weight_files import safetensors_files

WIDER = ("F32", "F16")  # than bf16, in range or in precision


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
        file: where it is.
        name: that it has there.
        dtype: as the format calls it, such as `BF16`.
        shape: of the whole tensor.
    """

    file: Path
    name: str
    dtype: str
    shape: list[int]
    _tensors: Any  # the file, open

    def read(self) -> torch.Tensor:
        """Return the tensor; it is mapped, and nothing is read until it is used."""
        tensor: torch.Tensor = self._tensors.get_tensor(self.name)
        return tensor

    def read_rows(self, start: int, end: int) -> torch.Tensor:
        """Read some rows alone.

        Args:
            start: the first row.
            end: the one after the last.
        """
        rows: torch.Tensor = self._tensors.get_slice(self.name)[start:end]
        return rows


def stored_tensors(source: str) -> dict[str, StoredTensor]:
    """List the tensors of a model's safetensors files under the names that they have there.

    Args:
        source: folder or hub id.
    """
    found = {}
    for file in safetensors_files(source):
        tensors: Any = safe_open(file, framework="pt", device="cpu")
        for name in tensors.keys():  # noqa: SIM118 (no mapping)
            part = tensors.get_slice(name)
            found[name] = StoredTensor(file, name, str(part.get_dtype()), list(part.get_shape()), tensors)
    return found


def under_names_of(model: PreTrainedModel, found: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return those tensors that a model has a parameter or buffer for, under the model's names.

    Args:
        model: of a base model's files, the prefix is added.
        found: from `stored_tensors`.
    """
    prefix = f"{model.base_model_prefix}."
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    known = {name: name if name in found else name.removeprefix(prefix) for name in names}
    return {name: found[there] for name, there in known.items() if there in found}
