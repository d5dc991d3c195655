"""Weights in and out are those of `save_pretrained` and `from_pretrained`, byte for byte and bit for bit."""

import hashlib
from pathlib import Path

import pytest
import torch
from models import SHAPE, tiny_model
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

import fullft.weights
from fullft.weights import save_weights


def made(family: str) -> PreTrainedModel:
    """Make a model; Mixtral's experts are one tensor in memory and many in files."""
    if family != "mixtral":
        return tiny_model(family, torch.bfloat16, tied=family == "qwen2")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MixtralConfig(**SHAPE, num_local_experts=4), dtype=torch.bfloat16)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# ---------------------------------------------------------------------------------------------- out


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mixtral"])
def test_files_are_those_of_save_pretrained(
    family: str, shard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fullft.weights, "MAX_SHARD_SIZE", shard)
    model = made(family)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    (tmp_path / "ours").mkdir()
    digests = save_weights(model, tmp_path / "ours")
    ours, theirs = contents(tmp_path / "ours"), contents(tmp_path / "theirs")
    assert ours == theirs and (len(digests) > 1) == (shard == "60KB")
    assert digests == {
        name: hashlib.sha256(data).hexdigest() for name, data in theirs.items() if name.endswith(".safetensors")
    }
    with torch.no_grad():  # the negative control
        model.get_input_embeddings().weight[0, 0] += 1
    assert save_weights(model, tmp_path / "ours") != digests and contents(tmp_path / "ours") != theirs
