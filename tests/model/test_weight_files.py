"""Weights that are quantised, whatever the config says, are refused by the headers of their files."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from families import model_of, of_experts
from models import make_config, tiny_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, PreTrainedConfig

from fullft.config.parse import parse_config
from fullft.errors import ModelError
from fullft.memory.screen import show_plan
from fullft.model.load import load_model
from fullft.model.source import find_config
from fullft.model.weight_files import require_trainable_numbers
from fullft.storage.tiers import Storage

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A tiny Llama, to be changed."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def rewrite(folder: Path, name: str, tensor: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: tensor}, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path) -> None:
    config = make_config(model=str(folder), precision="fp32")
    load_model(config, str(folder), Storage(torch.device("cpu"), config.output_dir))


NARROW = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32, torch.bool]


@pytest.mark.parametrize("dtype", NARROW)
def test_quantised_weights_are_refused(dtype: torch.dtype, folder: Path) -> None:
    weight = load_file(folder / "model.safetensors")[NAME]
    rewrite(folder, NAME, (weight * 1000).to(dtype))
    for attempt in (lambda: find_config(make_config(model=str(folder))), lambda: load(folder)):
        with pytest.raises(
            ModelError, match=f"quantised: 1 tensors such as {NAME} hold .* pass the original"
        ) as refusal:
            attempt()
        assert refusal.value.exit_code == 4


def test_a_plan_refuses_quantised_weights(folder: Path) -> None:
    words = ["--model", str(folder), "--plan", "--max_length", "64"]
    rewrite(folder, NAME, load_file(folder / "model.safetensors")[NAME].to(torch.float8_e4m3fn))
    with pytest.raises(ModelError, match="quantised"):
        show_plan(parse_config(words))


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E8M0", "I4", "U4"])
def test_dtypes_that_no_library_reads_are_refused(dtype: str, folder: Path) -> None:
    header = json.dumps({NAME: {"dtype": dtype, "shape": [32, 64], "data_offsets": [0, 1024]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(1024))
    with pytest.raises(ModelError, match=f"quantised: 1 tensors such as {NAME} hold {dtype} numbers"):
        find_config(make_config(model=str(folder)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_trainable_dtypes_load(dtype: torch.dtype, folder: Path) -> None:
    rewrite(folder, NAME, load_file(folder / "model.safetensors")[NAME].to(dtype))
    find_config(make_config(model=str(folder)))
    load(folder)


def test_quantised_bin_files_are_refused(folder: Path) -> None:
    tensors: dict[str, Any] = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    find_config(make_config(model=str(folder)))
    torch.save(tensors | {NAME: tensors[NAME].to(torch.float8_e4m3fn)}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="hold FLOAT8_E4M3FN numbers"):
        find_config(make_config(model=str(folder)))


# Names as quantisers write them, which are not the model's own.
@pytest.mark.parametrize(
    ("config", "name"),
    [
        (tiny_model("llama").config, "model.layers.0.mlp.up_proj.qweight"),
        (tiny_model("llama").config, "model.layers.0.mlp.up_proj.weight_packed"),
        (of_experts("gpt_oss"), "model.layers.0.mlp.experts.gate_up_proj_blocks"),
        (of_experts("mixtral"), "model.layers.0.block_sparse_moe.experts.3.w1.weight"),
        (tiny_model("gpt2").config, "h.0.attn.c_attn.bias"),
    ],
)
def test_parts_of_quantised_weights_are_recognised(config: PreTrainedConfig, name: str, tmp_path: Path) -> None:
    save_file({name: torch.zeros(4, 4, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="quantised"):
        require_trainable_numbers(str(tmp_path), config)


def test_integer_buffers_of_old_checkpoints_stay(tmp_path: Path) -> None:
    """GPT-2's files hold the causal mask of each layer."""
    model = model_of(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4))
    model.save_pretrained(tmp_path)
    for dtype in (torch.uint8, torch.bool):
        masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 16, 16, dtype=dtype) for layer in range(2)}
        tensors = load_file(tmp_path / "model.safetensors")
        save_file(tensors | masks, tmp_path / "model.safetensors", metadata={"format": "pt"})
        find_config(make_config(model=str(tmp_path)))
        load(tmp_path)
