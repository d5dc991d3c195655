"""The plan: a few layers stand for all, and its time does not grow with the batch or the tensors."""

import itertools
from dataclasses import replace

import pytest
import torch
from families import dense_before_experts, of_experts
from models import make_config
from transformers import AutoConfig, PreTrainedConfig
from worst_steps import deep

from fullft.config.config import Config
from fullft.memory import plan as plan_module
from fullft.memory.plan import Batch, _figures, layer_pattern, plan_step, trace
from fullft.memory.tracker import MemoryTracker
from fullft.model import loss as loss_module
from fullft.model.loss import LossSum
from fullft.model.source import find_config

MISTRAL = "mistralai/Mistral-7B-v0.1"
BATCH = Batch(1, 512, 512)
CASES = [
    ("gpt2", {"packing": True, "activation_checkpointing": "full", "precision": "bf16-true"}),
    ("llama", {"precision": "fp32", "optim": "adamw_8bit", "gradient_accumulation_steps": 1}),
    ("mistral", {"precision": "bf16-true", "activation_checkpointing": "every_2", "optim": "adamw_8bit"}),
    ("qwen2", {"activation_checkpointing": "selective", "precision": "bf16-mixed"}),
    ("phi", {"packing": True, "optim": "adamw_8bit"}),
    ("llama", {"offload": "optimizer=host,gradients=host"}),
    ("llama", {"offload": "parameters=host,optimizer=disk", "activation_checkpointing": "full"}),
    ("gpt2", {"offload": "gradients=released", "gradient_accumulation_steps": 1, "max_grad_norm": 0.0}),
]
MORE_CASES = [
    ("gemma2", {"precision": "bf16-true", "packing": True}),
    ("gpt2", {}),
    ("llama", {"activation_checkpointing": "every_2", "packing": True}),
    ("qwen2", {"activation_checkpointing": "full", "gradient_accumulation_steps": 1}),
    ("gemma2", {"activation_checkpointing": "every_2", "optim": "adamw_8bit"}),
    ("qwen2", {"activation_checkpointing": "selective", "precision": "bf16-true"}),
    ("phi", {"precision": "fp32", "activation_checkpointing": "full"}),
    ("qwen2", {"offload": "optimizer=disk,gradients=disk", "optim": "adamw_8bit"}),
]


@pytest.mark.parametrize(
    ("family", "options", "layers"),
    [
        (*CASES[0], 5),
        *(
            pytest.param(
                *case, 8 if case[1].get("activation_checkpointing") == "every_2" else 5, marks=pytest.mark.slow
            )
            for case in CASES[1:]
        ),
        *(pytest.param(*case, 9, marks=pytest.mark.slow) for case in [*CASES, *MORE_CASES]),
    ],
    ids=lambda value: "" if isinstance(value, dict) else None,
)
def test_plan_from_few_layers_equals_the_whole_trace(family: str, options: dict[str, object], layers: int) -> None:
    """All layers are more than the plan builds."""
    config, batch = make_config(**options), Batch(2, 24, 16)
    model_config = deep(family, layers)
    whole = _figures(
        config, trace(config, model_config, batch, layers, 0, layers)
    )  # no slot left out, nothing continued
    planned = plan_step(config, model_config, batch)
    if "parameters" in config.offload:
        # A streamed weight that is elsewhere leaves one number. How many do in evaluation is not linear in the layers.
        numbers = planned["phases"].pop("evaluation") - whole["phases"].pop("evaluation")
        assert 0 <= numbers < layers * 9 * torch.bfloat16.itemsize
    assert planned == whole
    assert sum(whole["at_peak"].values()) == whole["peak_bytes"] == max(whole["phases"].values())


@pytest.mark.parametrize(
    ("family", "stage", "options", "layers"),
    [
        ("llama", "full", {}, 7),
        *(
            pytest.param(family, stage, options, layers, marks=pytest.mark.slow)
            for (family, layers, options), stage in itertools.product(
                [
                    ("llama", 9, {"activation_checkpointing": "full", "gradient_accumulation_steps": 1}),
                    ("gpt2", 7, {"precision": "bf16-mixed", "activation_checkpointing": "selective"}),
                    ("gemma2", 12, {"precision": "fp32", "offload": "optimizer=host,gradients=host"}),
                ],
                ("none", "optimizer", "gradients", "full"),
            )
        ),
    ],
    ids=lambda value: "" if isinstance(value, dict) else None,
)
def test_few_layers_stand_for_sharded_ones(family: str, stage: str, options: dict[str, object], layers: int) -> None:
    """More of them than of whole ones: gathering reaches one layer ahead, and gradients leave one later."""
    config = make_config(plan=True, gpus=4, shard=stage, **options)
    model_config = deep(family, layers)
    planned = plan_step(config, model_config, Batch(2, 24, 16))
    assert planned == _figures(config, trace(config, model_config, Batch(2, 24, 16), layers, 0, layers))


def test_time_of_a_plan_does_not_grow_with_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (
        operators_of_a_plan(
            monkeypatch, make_config(plan=True, gpus=gpus, shard="full"), deep("llama", 4), Batch(1, 16, 16)
        )
        for gpus in (4, 64)
    )
    # Each rank's part of the norm.
    assert many - few <= 2 * (64 - 4)


MIXED = {
    "dense layers first": dense_before_experts,
    "experts in every other layer": lambda layers: of_experts(
        "qwen3_moe", num_hidden_layers=layers, decoder_sparse_step=2
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
def test_few_layers_stand_for_mixed_ones(kind: str, precision: str) -> None:
    """All layers are more than the plan builds, and the first ones are unlike the rest."""
    config, batch, model_config = make_config(precision=precision), Batch(1, 8), MIXED[kind](7)
    planned = plan_step(config, model_config, batch)
    assert planned == _figures(config, trace(config, model_config, batch, 7, 0, 7))
    # The control: as if all layers were alike.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "layer_pattern", lambda _: (0, 1))
        assert plan_step(config, model_config, batch) != planned


@pytest.mark.parametrize("layers", [5, pytest.param(9, marks=pytest.mark.slow)])
def test_plan_changes_with_one_layer_less(layers: int) -> None:
    config, batch = make_config(), Batch(2, 24, 16)
    assert plan_step(config, deep("llama", layers - 1), batch) != plan_step(config, deep("llama", layers), batch)


IN_PRECISIONS = [("llama", "fp32"), ("gemma2", "bf16-mixed"), ("gpt2", "bf16-true")]
CHUNKED = [Batch(1, 17, 25), Batch(2, 20, 8), Batch(4, 16, 16)]


@pytest.mark.parametrize(
    ("family", "precision", "batch", "layers"),
    [
        *((*model, batch, 2) for model, batch in zip(IN_PRECISIONS, CHUNKED, strict=True)),
        ("llama", "bf16-mixed", CHUNKED[-1], 2),
        *(
            pytest.param(*model, batch, 4, marks=pytest.mark.slow)
            for model, batch in itertools.product(IN_PRECISIONS, CHUNKED)
        ),
    ],
)
def test_two_chunks_of_the_loss_stand_for_all(
    family: str, precision: str, batch: Batch, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 8)
    config, model_config = make_config(precision=precision, activation_checkpointing="full"), deep(family, layers)
    planned = plan_step(config, model_config, batch)
    monkeypatch.setattr(plan_module, "LossSum", lambda model, most_chunks: LossSum(model))
    monkeypatch.setattr(loss_module, "standing_for_all", lambda parts: parts)
    assert plan_step(config, model_config, batch) == planned


def operators_of_a_plan(
    monkeypatch: pytest.MonkeyPatch, config: Config, model_config: PreTrainedConfig, batch: Batch
) -> int:
    """Count the operators of a plan, which its time depends on."""
    events = []
    original = MemoryTracker.__torch_dispatch__
    with monkeypatch.context() as patch:
        patch.setattr(
            MemoryTracker,
            "__torch_dispatch__",
            lambda self, operator, *rest: (events.append(operator), original(self, operator, *rest))[1],
        )
        plan_step(config, model_config, batch)
    return len(events)


@pytest.mark.slow
def test_plan_takes_no_more_operators_for_large_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 8)
    # With 128 tokens a group would fill attention's scratch memory, and a view of all of it is not an operator.
    large, small = (
        operators_of_a_plan(monkeypatch, make_config(), deep("llama", 4), batch)
        for batch in (Batch(16, 96, 96), Batch(2, 16, 16))
    )
    assert large == small


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["none", "optimizer=host,gradients=host", "optimizer=disk,gradients=disk"])
def test_plan_takes_no_more_operators_for_large_tensors(
    offload: str, small_chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some chunks and tiles stand for all, in the sums of gradients, the norm and the step."""

    def operators(vocabulary: int) -> int:
        model_config = deep("llama", 4)
        model_config.vocab_size = vocabulary
        config = make_config(offload=offload, precision="bf16-true", gradient_accumulation_steps=4)
        return operators_of_a_plan(monkeypatch, config, model_config, Batch(1, 16, 16))

    rows = small_chunks // deep("llama", 4).hidden_size + 1
    assert operators(100 * rows) == operators(10 * rows)


def test_kinds_of_layers_repeat() -> None:
    assert layer_pattern(deep("llama")) == (0, 1) and layer_pattern(deep("gemma2", 8)) == (0, 2)
    assert layer_pattern(AutoConfig.for_model("gpt2")) == (0, 1)
    assert layer_pattern(dense_before_experts(9)) == (3, 1)
    every_other = of_experts("qwen3_moe", num_hidden_layers=9, decoder_sparse_step=2)
    assert layer_pattern(every_other) == (0, 2)


def test_plan_of_mistral_7b_has_the_known_sizes() -> None:
    model_config = find_config(make_config(model=MISTRAL))
    config = make_config(model=MISTRAL, activation_checkpointing="full")
    none = replace(config, master_weights="none")
    planned = plan_step(none, model_config, BATCH)
    gigabytes = {name: round(size / 1e9, 2) for name, size in planned["components"].items()}
    assert planned["num_parameters"] == 7_241_732_096
    assert (gigabytes["parameters"], gigabytes["gradients"], gigabytes["optimizer_states"]) == (14.48, 14.48, 28.97)
    # The lesson's 2 x 28.97 GB are moments in fp32.
    mixed = plan_step(replace(config, precision="bf16-mixed"), model_config, BATCH)["components"]
    assert (round(mixed["parameters"] / 1e9, 2), round(mixed["optimizer_states"] / 1e9, 2)) == (28.97, 57.93)
    # Split masters: 16 bits more per weight, and moments in fp32; sums of gradients too.
    split = plan_step(config, model_config, BATCH)["components"]
    found = [round(split[name] / 1e9, 2) for name in ("parameters", "gradients", "optimizer_states")]
    assert found == [14.48, 28.97, 72.42]
    single = plan_step(replace(config, gradient_accumulation_steps=1), model_config, BATCH)["components"]
    assert round(single["gradients"] / 1e9, 2) == 14.48
