"""Weights in and out are those of `save_pretrained` and `from_pretrained`, byte for byte and bit for bit."""

import hashlib
from pathlib import Path

import pytest
import torch
from models import SHAPE, make_config, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

import fullft.model.load
from fullft.model.load import load_model, save_weights
from fullft.storage.tiers import Array, Storage, home_of, host_pieces


def made(family: str) -> PreTrainedModel:
    """Make a model; Mixtral's experts are one tensor in memory and many in files."""
    if family != "mixtral":
        return tiny_model(family, torch.bfloat16, tied=family == "qwen2")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MixtralConfig(**SHAPE, num_local_experts=4), dtype=torch.bfloat16)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# ---------------------------------------------------------------------------------------------- in


def loaded(folder: Path, offload: str = "none", **options: object) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """Load, and give copies of all tensors beside the model, those that bf16 rounds away too."""
    config = make_config(offload=offload, activation_checkpointing="full", **options)
    model = load_model(config, str(folder), Storage(torch.device("cpu"), folder))
    arrays: dict[str, Array] = dict(model.named_buffers())
    for name, parameter in model.named_parameters():
        arrays[name] = home_of(parameter)
        if hasattr(parameter, "rounded_off"):
            arrays[f"{name}, rounded off"] = parameter.rounded_off
    return model, {
        name: torch.cat([piece.flatten().clone() for piece in host_pieces(array)]) for name, array in arrays.items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        values.dtype == other[name].dtype and torch.equal(values, other[name]) for name, values in one.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2"])
def test_weights_split_as_they_come_are_those_split_afterwards(
    family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fullft.model.load, "_PIECE", 4096)  # so that tensors have several, the last one shorter
    original = made(family).to(dtype)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.mul_(1 + torch.rand_like(parameter) / 1024)  # beyond what bf16 holds
    original.save_pretrained(tmp_path)
    whole, at_once = loaded(tmp_path)
    assert not hasattr(whole, "_weight_conversions")  # from_pretrained has not been asked
    for offload in ("optimizer=host", "optimizer=disk", "parameters=disk,optimizer=disk"):
        assert same(at_once, loaded(tmp_path, offload)[1]), offload
    monkeypatch.setattr(fullft.model.load, "_one_by_one", lambda *_: None)
    theirs, afterwards = loaded(tmp_path)
    assert same(at_once, afterwards)
    assert whole.config.to_dict() == theirs.config.to_dict()
    assert whole.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert not same(at_once, loaded(tmp_path, master_weights="none")[1])  # the negative control


@pytest.mark.parametrize("what", ["too many", "converted"])
def test_files_that_are_not_just_the_model_are_left_to_from_pretrained(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made("llama" if what == "too many" else "mixtral").float().save_pretrained(tmp_path)
    if what == "too many":
        tensors = load_file(tmp_path / "model.safetensors")
        save_file(tensors | {"extra": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, tensors = loaded(tmp_path)
    assert hasattr(model, "_weight_conversions")
    assert ("1 tensors that its config.json has no place for, such as extra" in capsys.readouterr().out) == (
        what == "too many"
    )
    assert all(f"{name}, rounded off" in tensors for name, _ in model.named_parameters())


@pytest.mark.parametrize("free", [0, 1 << 40])
def test_files_are_read_through_only_where_memory_holds_them(
    free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fullft.model.load, "available_host_bytes", lambda: free)
    original = made("llama")
    original.save_pretrained(tmp_path)
    read: list[str] = []
    path_open = Path.open
    monkeypatch.setattr(
        Path, "open", lambda file, *more, **named: read.append(file.name) or path_open(file, *more, **named)
    )
    _, tensors = loaded(tmp_path)
    assert ("model.safetensors" in read) == (free > 0)
    assert all(torch.equal(tensors[name], values.detach().flatten()) for name, values in original.named_parameters())


# ---------------------------------------------------------------------------------------------- out


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mixtral"])
def test_files_are_those_of_save_pretrained(
    family: str, shard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fullft.model.load, "MAX_SHARD_SIZE", shard)
    model = made(family)
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
