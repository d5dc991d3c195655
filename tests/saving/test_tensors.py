"""Tensors: one rank writes them as safetensors does."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fullft.saving.tensors
from fullft.saving.files import sha256
from fullft.saving.tensors import stretch_of, write_tensors


def write(file: Path, tensors: dict[str, torch.Tensor]) -> str:
    return write_tensors({file: {name: stretch_of(tensor) for name, tensor in tensors.items()}})[file.name]


@pytest.mark.parametrize("is_direct", [True, False])
@pytest.mark.parametrize("block", [4096, 1 << 24])
def test_tensors_are_written_as_safetensors_writes_them(
    block: int, is_direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fullft.saving.tensors, "_BLOCK", block)
    if not is_direct:  # as where the file system cannot
        monkeypatch.setattr(fullft.saving.tensors, "set_direct", lambda *_: None)
    torch.manual_seed(0)
    shared = torch.arange(256, dtype=torch.float32)
    tensors = {
        "layer.weight.exp_avg": torch.randn(3, 5),
        "layer.weight.scale": torch.tensor(7.0),
        "a.codes": torch.randint(0, 255, (7,), dtype=torch.uint8),
        "b.remainder": torch.randint(-(2**15), 2**15, (9,), dtype=torch.int16),
        "b.moment": torch.randn(5, 3).bfloat16(),
        "c.count": torch.tensor(2**40),
        "d.empty": torch.empty(0, 4),
        "e.transposed": torch.randn(4, 6).t().contiguous(),
        "f.ünï": torch.randn(2).requires_grad_(),
        "g.many": torch.randn(3 * 4096 + 1),
    }
    digest = write(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert digest == sha256(tmp_path / "ours")
    # Beyond what theirs accepts: shared memory and other strides.
    tensors |= {"h.shared": shared, "h.again": shared, "i": torch.randn(4, 6).t()}
    write(tmp_path / "ours", tensors)
    found = load_file(tmp_path / "ours")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
