"""The plan on fake tensors gives what the tracker measures on real ones."""

import gc
import itertools
from pathlib import Path

import pytest
import torch
from emulated_cuda.library import is_loaded as is_emulated
from families import EXPERT_FAMILIES, of_experts
from families import model_of as model_of_config
from models import make_config, optimizer_of
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from worst_steps import model_of, worst_step

from fullft.attention.choice import attend_by_document
from fullft.data.micro_batch import MicroBatch
from fullft.memory.plan import Batch, plan_step
from fullft.memory.worst_step import take_worst_step
from fullft.model import loss as loss_module
from fullft.model.loss import LossSum
from fullft.model.parts import decoder_layers
from fullft.model.precision import autocast_of, dtype_of
from fullft.tracing import tracing
from fullft.transforms.activation_checkpointing import apply_activation_checkpointing

PRECISIONS = ("fp32", "bf16-mixed", "bf16-true")


def keep_layers(model: PreTrainedModel, count: int) -> None:
    """Drop all but the first decoder layers. A plan traces two at least, which are of both kinds in Gemma-2."""
    del decoder_layers(model)[count:]
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:count]
    model.config.num_hidden_layers = count


# Family, precision, checkpointing, optimizer, accumulation, packing, sequences x tokens, held-out tokens: each value of
# each with each family, and each pair of the others at least once.
AGREEMENT = [
    ("gpt2", "fp32", "none", "adamw", 1, False, Batch(2, 48, 32)),
    ("gpt2", "bf16-mixed", "full", "adamw_8bit", 4, True, Batch(1, 64, 64)),
    ("gpt2", "bf16-true", "every_2", "adamw", 4, False, Batch(1, 40)),
    ("llama", "fp32", "full", "adamw", 4, True, Batch(2, 48, 32)),
    ("llama", "bf16-mixed", "none", "adamw", 4, False, Batch(1, 300, 64)),  # more than attention has in a block
    ("llama", "bf16-true", "every_2", "adamw_8bit", 1, True, Batch(1, 64)),
    ("mistral", "fp32", "every_2", "adamw_8bit", 4, False, Batch(2, 48, 32)),
    ("mistral", "bf16-mixed", "none", "adamw", 1, True, Batch(1, 64, 64)),
    ("mistral", "bf16-true", "full", "adamw", 1, False, Batch(4, 16, 64)),
    ("qwen2", "fp32", "none", "adamw_8bit", 1, True, Batch(2, 48, 32)),
    ("qwen2", "bf16-mixed", "every_2", "adamw", 4, False, Batch(1, 64)),
    ("qwen2", "bf16-true", "full", "adamw", 4, True, Batch(1, 4, 4)),
    ("gemma2", "fp32", "full", "adamw", 1, False, Batch(2, 48, 32)),
    ("gemma2", "bf16-mixed", "every_2", "adamw", 1, True, Batch(1, 64, 64)),
    ("gemma2", "bf16-true", "none", "adamw_8bit", 4, False, Batch(3, 10, 30)),
    ("phi", "fp32", "every_2", "adamw", 4, True, Batch(2, 48, 32)),
    ("phi", "bf16-mixed", "full", "adamw", 1, False, Batch(1, 64)),
    ("phi", "bf16-true", "none", "adamw_8bit", 4, False, Batch(1, 64, 64)),
    ("gpt2", "bf16-mixed", "selective", "adamw", 4, False, Batch(2, 48, 32)),
    ("llama", "fp32", "selective", "adamw", 1, True, Batch(1, 300, 64)),
    ("mistral", "bf16-true", "selective", "adamw", 4, True, Batch(1, 64, 64)),
    ("gemma2", "bf16-mixed", "selective", "adamw_8bit", 4, True, Batch(1, 64)),
]
# What else a run may keep, and where, in turn with these cases.
PLACES: list[dict[str, object]] = [
    {},
    {"master_weights": "none"},
    {"offload": "optimizer=host"},
    {"master_weights": "stochastic", "offload": "optimizer=disk,gradients=disk"},
    {"offload": "gradients=host"},
    {"offload": "optimizer=disk,gradients=host", "master_weights": "none"},
    {"offload": "gradients=disk"},
]


IN_PLACES = [(*case, PLACES[number % len(PLACES)]) for number, case in enumerate(AGREEMENT)]


# Each case with all four layers of the tiny model. Most of these are slow, and their fast twins have two layers.
@pytest.mark.parametrize(
    ("family", "precision", "mode", "optim", "accumulation", "packing", "batch", "place", "layers"),
    [
        *((*case, 4 if number % 5 == 4 else 2) for number, case in enumerate(IN_PLACES)),
        *(pytest.param(*case, 4, marks=pytest.mark.slow) for number, case in enumerate(IN_PLACES) if number % 5 != 4),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_plan_equals_what_is_tracked(
    family: str,
    precision: str,
    mode: str,
    optim: str,
    accumulation: int,
    packing: bool,
    batch: Batch,
    place: dict[str, object],
    layers: int,
    tmp_path: Path,
    small_chunks: int,
) -> None:
    config = make_config(
        precision=precision,
        activation_checkpointing=mode,
        optim=optim,
        gradient_accumulation_steps=accumulation,
        packing=packing,
        output_dir=tmp_path,
        **place,
    )
    model = model_of(family, config, dropout=0.1 if family in ("gpt2", "phi") else 0.0)
    keep_layers(model, layers)
    planned = plan_step(config, model.config, batch)
    tracked = worst_step(model, config, batch).to_dict()
    assert planned["peak_phase"] == tracked["peak_phase"]
    assert planned["peak_bytes"] == pytest.approx(tracked["peak_bytes"], rel=1e-3)
    for kind in ("components", "at_peak", "phases"):
        assert planned[kind] == pytest.approx(tracked[kind], rel=1e-3)
    assert (planned["host_bytes"], planned["disk_bytes"]) == (tracked["host_bytes"], tracked["disk_bytes"])
    assert (planned["host_bytes"] > 0) is ("host" in config.offload)
    assert (planned["disk_bytes"] > 0) is ("disk" in config.offload)


EXPERTS = [*itertools.product(("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"), ("fp32", "bf16-mixed"))]
MORE_EXPERTS = [*itertools.product((*EXPERT_FAMILIES, "ernie4_5_moe", "granitemoe", "llama4_text"), PRECISIONS)]


@pytest.mark.parametrize(
    ("family", "precision"),
    [*EXPERTS, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_EXPERTS if case not in EXPERTS)],
)
def test_plan_of_experts_equals_what_is_tracked(family: str, precision: str) -> None:
    """In fp32 too, where torch's own fake kernel of experts refuses."""
    config = make_config(precision=precision, gradient_accumulation_steps=4)
    model_config, batch = of_experts(family, num_hidden_layers=2), Batch(2, 24, 16)
    model = model_of_config(model_config, dtype_of(config.numerics.weights)).requires_grad_(True)
    attend_by_document(model)
    tracked = worst_step(model, config, batch).to_dict()
    planned = plan_step(config, model_config, batch)
    assert planned["peak_phase"] == tracked["peak_phase"]
    for kind in ("components", "at_peak", "phases"):
        # Ernie's bias of its router, 8 numbers a layer, is no part of the loss, and gets no gradient.
        assert planned[kind] == pytest.approx(tracked[kind], abs=64)


def test_operators_that_fail_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="contraction dimension"), tracing():  # noqa: PT012
        offsets = torch.zeros(2, dtype=torch.int32)
        torch.nn.functional.grouped_mm(torch.zeros(4, 16), torch.zeros(2, 8, 16), offs=offsets)
    assert capfd.readouterr().err == ""


HEADS = ["llama", "gemma2", "phi"]  # a plain one, a soft-capped one, and one with a bias


@pytest.mark.parametrize(
    ("family", "precision", "layers"),
    [
        ("llama", "fp32", 2),
        ("gemma2", "bf16-mixed", 2),
        ("phi", "bf16-true", 2),
        ("llama", "bf16-mixed", 2),
        ("phi", "fp32", 2),
        *(pytest.param(*case, 4, marks=pytest.mark.slow) for case in itertools.product(HEADS, PRECISIONS)),
    ],
)
def test_plan_of_many_loss_chunks_is_exact(
    precision: str, family: str, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine chunks, the last one cut, of logits that are most of the step; held out there are as many."""
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 8)
    config, batch = make_config(precision=precision, activation_checkpointing="full"), Batch(3, 22, 23)
    model = model_of(family, config)
    keep_layers(model, layers)
    tracked = worst_step(model, config, batch).to_dict()
    planned = plan_step(config, model.config, batch)
    assert {name: planned[name] for name in tracked} == tracked
    # The negative control: one chunk of all tokens.
    monkeypatch.setattr(loss_module, "_chunks", lambda count: [(0, count)])
    assert plan_step(config, model.config, batch)["peak_bytes"] > tracked["peak_bytes"]


@pytest.mark.parametrize("layers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_plan_of_other_options_differs(layers: int) -> None:
    """The negative control: each option changes the figures by far more than the tolerance."""
    tracked_config = make_config(precision="bf16-mixed", gradient_accumulation_steps=4)
    model = model_of("llama", tracked_config)
    keep_layers(model, layers)
    tracked = worst_step(model, tracked_config, Batch(1, 64, 64)).to_dict()
    changes = [
        {"precision": "fp32"},
        {"activation_checkpointing": "full"},
        {"optim": "adamw_8bit"},
        {"gradient_accumulation_steps": 1},
        {"offload": "optimizer=host"},
        {"offload": "gradients=disk"},
        {"precision": "bf16-true"},
    ]
    for change in changes:
        other = make_config(**{"precision": "bf16-mixed", "gradient_accumulation_steps": 4, **change})
        planned = plan_step(other, model.config, Batch(1, 64, 64))
        assert planned["peak_bytes"] != pytest.approx(tracked["peak_bytes"], rel=1e-2), change


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mode", ["none", "full"])
def test_plan_is_within_2_percent_of_cuda_peak(precision: str, mode: str) -> None:
    """At a size where the allocator's rounding to 512 bytes and the matrix library's workspace weigh little.

    The emulated device computes a smaller one, where they weigh more: there, what tensors asked for is compared.
    """
    config = make_config(precision=precision, activation_checkpointing=mode, gradient_accumulation_steps=2)
    sizes = {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8}
    length, counted = 2048, "allocated"
    if is_emulated():
        sizes |= {"vocab_size": 8000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4}
        length, counted = 128, "requested"
    shape = LlamaConfig(num_attention_heads=16, **sizes)
    gc.collect()  # an earlier test's model is full of cycles
    model = AutoModelForCausalLM.from_config(shape, dtype=dtype_of(config.numerics.weights)).cuda().train()
    apply_activation_checkpointing(model, config)
    planned = plan_step(config, shape, Batch(1, length, length // 4))
    torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(0, 8000, (1, length))
    train_batch = MicroBatch({"input_ids": ids}, ids, length, length - 1)
    held_out = MicroBatch.of(ids[:, : length // 4].contiguous())
    optimizer = optimizer_of(model, config)
    autocast = autocast_of(config.numerics, torch.device("cuda"))
    take_worst_step(model, LossSum(model), optimizer, [train_batch] * 2, held_out, autocast, 1.0)
    optimizer.close()  # its hooks keep the model alive
    peak = torch.cuda.memory_stats()[f"{counted}_bytes.all.peak"]
    assert planned["peak_bytes"] == pytest.approx(peak, rel=0.02)
