"""Losses besides cross entropy that a config asks for are refused, or said to be left out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EXPERT_FAMILIES, model_of, of_experts
from models import SHAPE, make_config, summed_loss, tiny_model
from transformers import AutoConfig, PreTrainedConfig

from fullft.config.parse import parse_config
from fullft.errors import ModelError
from fullft.memory.screen import show_plan
from fullft.model.extra_losses import describe_left_out, require_cross_entropy_alone
from fullft.model.parts import describe_model
from fullft.model.source import find_config

BAMBA = {**SHAPE, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "attn_layer_indices": [0, 1]}
ASKED: list[tuple[PreTrainedConfig, str]] = [
    (of_experts("mixtral", output_router_logits=True), "output_router_logits to false"),
    (of_experts("qwen3_moe", output_router_logits=True, router_aux_loss_coef=1.0), "output_router_logits to false"),
    (AutoConfig.for_model("jetmoe", output_router_logits=True), "output_router_logits to false"),
    (AutoConfig.for_model("dbrx", output_router_logits=True), "output_router_logits to false"),
    (AutoConfig.for_model("bamba", **BAMBA, z_loss_coefficient=0.5), "z_loss_coefficient to 0"),
    (AutoConfig.for_model("llama", **SHAPE, loss_type="ForMaskedLM"), "loss_type to null"),
]


@pytest.mark.parametrize(("config", "remedy"), ASKED, ids=lambda value: getattr(value, "model_type", ""))
def test_other_losses_are_refused(config: PreTrainedConfig, remedy: str) -> None:
    with pytest.raises(ModelError, match=f"set {remedy} there") as refusal:
        require_cross_entropy_alone(config, "tiny")
    assert refusal.value.exit_code == 4


def test_runs_and_plans_refuse_them_early(tmp_path: Path) -> None:
    of_experts("mixtral", output_router_logits=True).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="another loss"):
        find_config(make_config(model=str(tmp_path)))
    with pytest.raises(ModelError, match="another loss"):
        show_plan(parse_config(["--model", str(tmp_path), "--plan"]))
    values: dict[str, Any] = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"output_router_logits": False}))
    find_config(make_config(model=str(tmp_path)))  # the remedy


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_passed_models_have_no_other_loss(family: str) -> None:
    """transformers' own loss is the cross entropy: what its default config adds would show here."""
    model = model_of(of_experts(family))
    require_cross_entropy_alone(model.config, "tiny")
    ids = torch.randint(1, 1024, (1, 20))
    theirs = model(input_ids=ids, labels=ids, use_cache=False).loss.item()
    assert summed_loss(model, ids).item() / 19 == pytest.approx(theirs, rel=1e-5)


def test_refused_loss_is_added_by_transformers() -> None:
    """The control: it is more than cross entropy, and not the same for two micro-batches as for both at once."""
    model = model_of(of_experts("mixtral", output_router_logits=True, router_aux_loss_coef=1.0))
    ids = torch.randint(1, 1024, (2, 20))
    added = [model(input_ids=each, use_cache=False).aux_loss.item() for each in (ids, ids[:1], ids[1:])]
    theirs = model(input_ids=ids, labels=ids, use_cache=False).loss.item()
    assert summed_loss(model, ids).item() / 38 == pytest.approx(theirs - added[0], rel=1e-5)
    assert added[0] != pytest.approx((added[1] + added[2]) / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("family", "more", "said"),
    [
        ("deepseek_v2", {"aux_loss_alpha": 0.001}, "aux_loss_alpha 0.001"),
        ("deepseek_v3", {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers 1"),
        ("mixtral", {}, None),
    ],
)
def test_what_transformers_leaves_out_is_said(family: str, more: dict[str, Any], said: str | None) -> None:
    model = model_of(of_experts(family, **more))
    require_cross_entropy_alone(model.config, "tiny")
    described = describe_model(make_config(), model)
    assert (f"warning: {said} in config.json is left out" in described) is (said is not None)


def test_code_that_adds_its_own_loss_is_refused() -> None:
    class Own(type(tiny_model("llama").config)):  # type: ignore[misc]
        """Not one of transformers."""

    with pytest.raises(ModelError, match="aux_loss_alpha to 0"):
        require_cross_entropy_alone(Own(**SHAPE, aux_loss_alpha=0.001), "tiny")
    assert not describe_left_out(Own(**SHAPE, aux_loss_alpha=0.0))
