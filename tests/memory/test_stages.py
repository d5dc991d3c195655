"""Stages of sharding that a model cannot be trained in are not chosen, and refused with a remedy."""

from dataclasses import replace

import pytest
import torch
from families import of_experts
from models import make_config, tiny_model
from worst_steps import deep

from fullft.config.config import Config
from fullft.errors import OptionsError
from fullft.memory.choose import Plans, choose
from fullft.memory.machine import Device
from fullft.memory.plan import Batch, plan_step
from fullft.memory.speeds import ASSUMED
from fullft.memory.stages import STAGES, possible_stages, require_stage
from fullft.optim.build import find_torn_block


def config_of(gpus: int, **options: object) -> Config:
    return make_config(plan=True, gpus=gpus, **options)


@pytest.mark.parametrize(
    ("rows", "width", "count", "is_torn"),
    [
        (1024, 32, 8, False),  # 128 rows: 16 blocks
        (1024, 32, 3, True),  # 342 rows: 42.75 blocks
        (1024, 256, 7, False),  # any number of rows
        (512, 33, 512, True),  # a row
        (1, 20000, 4, False),  # one rank has all
        (100, 100, 3, False),  # too small for 8 bits
    ],
)
def test_blocks_are_torn_where_rows_begin_inside(rows: int, width: int, count: int, is_torn: bool) -> None:
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.empty(rows, width, device="meta"))
    numerics = make_config(optim="adamw_8bit").numerics
    assert find_torn_block(model, numerics, count) == ("weight" if is_torn else None)
    begins = [min(rows, rank * -(-rows // count)) * width for rank in range(count)]
    assert is_torn == (rows * width >= 16384 and any(begin % 256 for begin in begins if begin < rows * width))
    assert find_torn_block(model, make_config().numerics, count) is None


def test_torn_blocks_are_refused() -> None:
    model_config, stages = deep("llama", 2), {"optimizer", "gradients", "full"}
    torn = config_of(3, optim="adamw_8bit")
    assert possible_stages(torn, model_config) == possible_stages(replace(torn, shard="none"), model_config) == ["none"]
    assert set(possible_stages(config_of(4, optim="adamw_8bit"), model_config)) == {*stages, "none"}
    assert set(possible_stages(config_of(3), model_config)) == {*stages, "none"}
    for refuse in (require_stage, lambda config, model_config: plan_step(config, model_config, Batch(1, 8))):
        with pytest.raises(OptionsError, match=r"lm_head\.weight .* blocks of 256 .* use --optim adamw, --shard none"):
            refuse(replace(torn, shard="full"), model_config)
    require_stage(replace(torn, shard="none"), model_config)


def test_experts_are_not_trained_in_whole_gradients() -> None:
    model_config = of_experts("mixtral", num_hidden_layers=2)
    assert possible_stages(config_of(4), model_config) == ["gradients", "full"]
    assert possible_stages(config_of(4), tiny_model("llama").config) == list(STAGES)
    with pytest.raises(OptionsError, match="experts .* use --shard gradients, or full"):
        require_stage(config_of(4, shard="optimizer"), model_config)
    require_stage(config_of(4, shard="gradients"), model_config)


def test_choice_passes_over_impossible_stages() -> None:
    plans, device = Plans(of_experts("mixtral", num_hidden_layers=2)), Device("mine", 2**40)
    slow = replace(ASSUMED, interconnect=1e9)  # there `optimizer` would be the fastest
    chosen, line = choose(config_of(4), plans, Batch(1, 16), device, lambda: slow)
    assert chosen.shard == "gradients" and "shard gradients" in line
    chosen, _ = choose(config_of(4), Plans(deep("llama", 2)), Batch(1, 16), device, lambda: slow)
    assert chosen.shard == "optimizer"
