"""Files are loaded into homes layer by layer, with masters of every bit, and saved from there as the whole model."""

import json
from pathlib import Path

import pytest
import torch
from models import make_config, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from fullft.config.config import Config
from fullft.model.load import load_model
from fullft.model.parts import decoder_layers
from fullft.model.precision import join
from fullft.optim.build import build_optimizer
from fullft.saving.weights import save_weights
from fullft.storage.tiers import Storage, home_of, host_pieces
from fullft.transforms.streaming import apply_layer_streaming


def options(offload: str, **others: object) -> Config:
    return make_config(**{"offload": offload, "activation_checkpointing": "full", "weight_decay": 0.1, **others})


def content(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {
        name: torch.cat([piece.flatten().clone() for piece in host_pieces(home_of(parameter))]).detach()
        for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen2", True), ("gpt2", True)])
def test_layers_loaded_and_saved_singly_stay_equal(family: str, tied: bool, tier: str, tmp_path: Path) -> None:
    """A file of save_pretrained loads into homes, and what is saved from there loads as from save_pretrained."""
    original = tiny_model(family, torch.bfloat16, tied=tied)
    original.save_pretrained(tmp_path / "original")
    config = options(f"parameters={tier}")
    storage = Storage(torch.device("cpu"), tmp_path)
    model = load_model(config, str(tmp_path / "original"), storage)
    expected = {name: values.detach().flatten() for name, values in original.named_parameters()}
    assert all(torch.equal(expected[name], values) for name, values in content(model).items())
    assert all(p.numel() == 1 or p.untyped_storage().nbytes() <= 8 for p in decoder_layers(model).parameters())
    apply_layer_streaming(model, storage)
    (tmp_path / "saved").mkdir()
    save_weights(model, tmp_path / "saved")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(expected[name], p.detach().flatten()) for name, p in loaded.named_parameters())
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("original", "saved")]
    assert configs[0] == configs[1]
    ids = torch.ones(1, 4, dtype=torch.int64)
    with torch.no_grad():
        assert torch.equal(model.eval()(ids, use_cache=False).logits, loaded.eval()(ids, use_cache=False).logits)


@pytest.mark.parametrize("offload", ["none", "optimizer=disk", "parameters=disk,optimizer=host"])
def test_masters_start_from_the_fp32_numbers_in_files(offload: str, tmp_path: Path) -> None:
    original = tiny_model("llama", torch.float32)
    original.save_pretrained(tmp_path / "original")
    config = options(offload)
    storage = Storage(torch.device("cpu"), tmp_path)
    model = load_model(config, str(tmp_path / "original"), storage)
    apply_layer_streaming(model, storage)
    optimizer = build_optimizer(model, config, storage)
    weights = content(model)
    for name, parameter in original.named_parameters():
        remainder = optimizer.states_of(dict(model.named_parameters())[name])["remainder"]
        master = torch.empty(parameter.numel())
        pieces = torch.cat([piece.clone() for piece in host_pieces(remainder)])
        join(weights[name], pieces, master)
        assert torch.equal(master, parameter.detach().flatten()) and weights[name].dtype == torch.bfloat16
        assert pieces.any()  # the negative control: rounding has left something


@pytest.mark.parametrize("offload", ["none", "parameters=host"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_masters_are_found_without_the_base_model_prefix(offload: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """GPT-2's published files lack it."""
    original = tiny_model("gpt2", dtype)
    original.transformer.save_pretrained(tmp_path / "original")
    config = options(offload)
    storage = Storage(torch.device("cpu"), tmp_path)
    model = load_model(config, str(tmp_path / "original"), storage)
    weights = content(model)
    for name, parameter in original.named_parameters():
        master = torch.empty(parameter.numel())
        join(weights[name], storage.remainders[dict(model.named_parameters())[name]].clone(), master)
        assert torch.equal(master, parameter.detach().flatten().float())


def test_other_files_in_the_folder_are_not_loaded(tmp_path: Path) -> None:
    original, other = tiny_model("llama", torch.bfloat16), tiny_model("llama", torch.float32, seed=1)
    original.save_pretrained(tmp_path)
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "model.fp32.safetensors")
    for offload in ("none", "parameters=host"):
        weights = content(load_model(options(offload), str(tmp_path), Storage(torch.device("cpu"), tmp_path)))
        assert all(torch.equal(weights[name], p.detach().flatten()) for name, p in original.named_parameters())
