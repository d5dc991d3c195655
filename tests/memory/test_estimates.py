"""LoRA and time follow their formulas."""

from dataclasses import replace

import pytest
from models import make_config

from fullft.memory.choose import Plans
from fullft.memory.estimates import estimate_adapters, estimate_work
from fullft.memory.plan import Batch
from fullft.model.source import find_config

MISTRAL = "mistralai/Mistral-7B-v0.1"
PARAMETERS = 7_241_732_096
BATCH = Batch(1, 512, 512)


def test_lora_and_time_follow_their_formulas() -> None:
    plans = Plans(find_config(make_config(model=MISTRAL)))
    config = make_config(model=MISTRAL, precision="bf16-true", activation_checkpointing="full")
    facts, count = plans.facts(512), PARAMETERS
    assert facts.lora_parameters == 32 * 8 * (4096 + 4096 + 4096 + 1024)
    assert facts.layer_matrices == 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    lora, qlora = estimate_adapters(config, plans, BATCH)
    assert lora["parameters"] == 2 * count + 4 * facts.lora_parameters
    assert lora["gradients"] + lora["optimizer_states"] == 12 * facts.lora_parameters
    assert 3.9e9 < qlora["parameters"] < 4.2e9
    # Beside several ranks it is that of one GPU.
    shared = replace(config, plan=True, gpus=8, shard="full")
    assert estimate_adapters(shared, plans, BATCH) == (lora, qlora)
    work = estimate_work(config, facts, BATCH)
    assert (work.rows, work.tokens) == (2850, 2850 * 512)
    assert work.training_flops == work.tokens * facts.flops_per_token
    assert work.flops == pytest.approx(work.training_flops * 4 / 3)
    assert facts.flops_per_token == 6 * (count - 32000 * 4096) + 12 * 32 * 4096 * 512
    assert estimate_work(replace(config, max_steps=10), facts, BATCH).rows == 160
