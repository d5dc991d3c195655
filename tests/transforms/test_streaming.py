"""Layers that come and go compute what layers that stay compute: bitwise, in training, evaluation and generation."""

from pathlib import Path

import pytest
import torch
from emulated_cuda.library import is_loaded as is_emulated
from models import make_config, summed_loss, tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from fullft.config.config import Config
from fullft.config.steps import Steps
from fullft.model.homes import move_layers_home
from fullft.model.load import load_model
from fullft.model.parts import decoder_layers
from fullft.optim.adamw import AdamW
from fullft.optim.build import build_optimizer
from fullft.saving.checkpoint import save_checkpoint, verify
from fullft.saving.resuming import restore
from fullft.storage.tiers import Storage, home_of, host_pieces, lives_elsewhere
from fullft.transforms.activation_checkpointing import apply_activation_checkpointing
from fullft.transforms.streaming import LayerStream, apply_layer_streaming, stream_of

PLACEMENTS = [
    "parameters=host",
    "parameters=disk",
    "parameters=host,optimizer=host,gradients=host",
    "parameters=disk,optimizer=disk,gradients=disk",
    "parameters=host,optimizer=disk",
]


def prepared(model: PreTrainedModel, config: Config, folder: Path, device: str = "cpu") -> AdamW:
    """Stream layers if the options say so, and build the optimizer, as train.py does."""
    storage = Storage(torch.device(device), folder)
    if config.placement.streams_layers and not any(map(lives_elsewhere, model.parameters())):
        move_layers_home(model, config.placement.parameters, storage)
    apply_activation_checkpointing(model, config)
    apply_layer_streaming(model, storage)
    return build_optimizer(model, config, storage)


def options(offload: str, **others: object) -> Config:
    return make_config(**{"offload": offload, "activation_checkpointing": "full", "weight_decay": 0.1, **others})


def train(
    model: PreTrainedModel, optimizer: AdamW, config: Config, first: int = 1, last: int = 3
) -> list[torch.Tensor]:
    figures = []
    for step in range(first, last + 1):
        random = torch.Generator().manual_seed(step)
        torch.manual_seed(step)  # of dropout
        for _ in range(config.gradient_accumulation_steps):
            ids = torch.randint(0, 1024, (1, 12), generator=random)
            loss = summed_loss(model, ids) / 11
            loss.backward()
            figures.append(loss.detach())
        figures.append(optimizer.clip_gradients(0.5))
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            figures.append(model(input_ids=ids, use_cache=False).logits)
        model.train()
    return figures


def content(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {
        name: torch.cat([piece.flatten().clone() for piece in host_pieces(home_of(parameter))]).detach()
        for name, parameter in model.named_parameters()
    }


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(
    ("family", "tied"),
    [
        ("llama", False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("qwen2", True), ("gpt2", True), ("gemma2", False)]),
    ],
)
def test_streamed_layers_train_as_resident_ones(family: str, tied: bool, accumulation: int, tmp_path: Path) -> None:
    results = []
    for offload in ("none", *PLACEMENTS):
        config = options(offload, gradient_accumulation_steps=accumulation)
        model = tiny_model(family, torch.bfloat16, dropout=0.1 if family == "gpt2" else 0.0, tied=tied)
        optimizer = prepared(model, config, tmp_path)
        results.append((train(model, optimizer, config), content(model)))
    resident, weights = results[0]
    for offload, (figures, streamed) in zip(PLACEMENTS, results[1:], strict=True):
        assert same(resident, figures), offload
        assert all(torch.equal(weights[name].flatten(), values) for name, values in streamed.items()), offload


def test_old_weights_change_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: layers that stay after the step compute with the weights before it."""
    config = options("parameters=host")
    results = []
    for release in (LayerStream.release, lambda self: None):
        monkeypatch.setattr(LayerStream, "release", release)
        model = tiny_model("llama", torch.bfloat16)
        results.append(train(model, prepared(model, config, tmp_path), config))
    assert not same(*results)


def test_two_layers_are_on_the_device_at_once(tmp_path: Path) -> None:
    model = tiny_model("llama", torch.bfloat16)
    prepared(model, options("parameters=disk"), tmp_path)
    seen = []

    def look(*_: object) -> None:
        present = [sum(p.is_contiguous() for p in layer.parameters()) for layer in decoder_layers(model)]
        seen.append(sum(count > 0 for count in present))

    for layer in decoder_layers(model):
        layer.register_forward_hook(look)
    model(input_ids=torch.ones(1, 4, dtype=torch.int64), use_cache=False)
    assert max(seen) <= 2  # the one at work, and the next one
    memory = sum(memory.nbytes for memory in stream_of(model).memory)
    layers = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in decoder_layers(model)]
    assert 2 * max(layers) <= memory < 2 * max(layers) + 2 * 9 * 4096  # whole pages for each tensor


def test_streamed_model_generates_as_the_resident_one(tmp_path: Path) -> None:
    ids = torch.ones(1, 4, dtype=torch.int64)
    generation = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    texts = []
    for offload in ("none", "parameters=host", "parameters=disk"):
        model = tiny_model("llama", torch.bfloat16)
        prepared(model, options(offload), tmp_path)
        with torch.no_grad():
            texts.append(model.eval().generate(ids, generation_config=generation).tolist())
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("begun", ["none", *PLACEMENTS[1:4]])
def test_run_continues_in_any_other_placement(begun: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    def config_of(offload: str) -> Config:
        return options(offload, output_dir=tmp_path, gradient_accumulation_steps=2)

    model = tiny_model("llama", torch.bfloat16)
    optimizer = prepared(model, config_of(begun), tmp_path)
    train(model, optimizer, config_of(begun), 1, 2)
    folder = save_checkpoint(config_of(begun), Steps(config_of(begun), 9), 2, model, tokenizer, optimizer, "rows")
    whole = train(model, optimizer, config_of(begun), 3, 4)
    for continued in ("none", *PLACEMENTS[:4]):
        config = config_of(continued)
        model = load_model(config, str(folder), Storage(torch.device("cpu"), tmp_path))
        optimizer = prepared(model, config, tmp_path)
        assert restore(verify(folder), config, Steps(config, 9), model, optimizer, "rows") == 2
        assert same(train(model, optimizer, config, 3, 4), whole), (begun, continued)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("offload", [*PLACEMENTS, "optimizer=host", "gradients=host", "optimizer=disk,gradients=disk"])
def test_gpu_placements_train_as_the_resident_one(offload: str, tmp_path: Path) -> None:
    """Large enough that copies and computing overlap, and that a copy made too early shows."""
    sizes = {"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6}
    if is_emulated():  # it finds races at any size
        sizes = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6}
    shape = LlamaConfig(num_attention_heads=8, **sizes)
    trajectories = []
    for where in ("none", offload):
        config = options(where, gradient_accumulation_steps=3)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).cuda().train()
        optimizer = prepared(model, config, tmp_path, "cuda")
        losses = []
        for step in range(3):
            for _ in range(3):
                ids = torch.randint(0, 1024, (1, 256), generator=torch.Generator().manual_seed(step)).cuda()
                loss = summed_loss(model, ids) / 255
                loss.backward()
                losses.append(loss.item())
            optimizer.clip_gradients(1.0)
            optimizer.step()
            optimizer.zero_grad()
        trajectories.append((losses, content(model)))
    (resident, weights), (moved, streamed) = trajectories
    assert moved == resident
    assert all(torch.equal(weights[name].flatten().cpu(), values.cpu()) for name, values in streamed.items())
