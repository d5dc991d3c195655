"""Saving weights is what `save_pretrained` does, byte for byte."""

import hashlib
from pathlib import Path

import pytest
import torch
from models import bf16_model

import fullft.saving.weights
from fullft.saving.weights import save_weights


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mixtral"])
def test_files_equal_those_of_save_pretrained(
    family: str, shard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fullft.saving.weights, "MAX_SHARD_SIZE", shard)
    model = bf16_model(family)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    (tmp_path / "ours").mkdir()
    digests = save_weights(model, tmp_path / "ours")
    ours, theirs = contents(tmp_path / "ours"), contents(tmp_path / "theirs")
    assert ours == theirs and (len(digests) > 1) == (shard == "60KB")
    assert digests == {
        name: hashlib.sha256(data).hexdigest() for name, data in theirs.items() if name.endswith(".safetensors")
    }
    assert set(save_weights(model, tmp_path / "ours", is_hashed=False).values()) == {""}
    assert contents(tmp_path / "ours") == theirs
    with torch.no_grad():  # the negative control
        model.get_input_embeddings().weight[0, 0] += 1
    assert save_weights(model, tmp_path / "ours") != digests and contents(tmp_path / "ours") != theirs
