"""A run that cannot fit stops before its weights are loaded, and after those that are missing."""

from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from models import make_config
from worst_steps import deep

from fullft.data.micro_batch import MicroBatch
from fullft.errors import MemoryExhaustedError
from fullft.memory.plan import Batch, plan_step
from fullft.memory.run import plan_run


def test_run_that_cannot_fit_stops_before_loading() -> None:
    model_config, cpu = deep("llama", 2), torch.device("cpu")
    config, ids = make_config(precision="bf16-mixed", offload="none"), torch.ones(1, 32, dtype=torch.int64)
    train = Mock(steps_per_epoch=1, sequences_per_step=16, mean_length=32.0)
    data = Mock(train=train, largest=lambda accumulation: ([MicroBatch.of(ids)] * accumulation, None))
    with pytest.raises(MemoryExhaustedError) as refusal:
        plan_run(replace(config, device_memory="512.5MiB"), model_config, data, cpu)
    assert refusal.value.exit_code == 8
    for part in ("512.5MiB card has 0.50 MiB", "MiB at its peak", "--precision bf16-true", "--fit off"):
        assert part in str(refusal.value)
    plan = plan_run(replace(config, device_memory="1GiB"), model_config, data, cpu)
    assert plan.config.activation_checkpointing == "none"
    assert plan.figures == plan_step(plan.config, model_config, Batch(1, 32))
    off = make_config(precision="bf16-mixed", device_memory="512.5MiB", fit="off")
    assert plan_run(off, model_config, data, cpu).figures == plan.figures
