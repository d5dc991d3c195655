"""What each tier holds by arithmetic is what the plan counts there."""

import pytest
from models import make_config
from worst_steps import deep

from fullft.memory.choose import Plans
from fullft.memory.plan import Batch
from fullft.memory.traffic import held_bytes


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    "offload", ["none", "optimizer=host", "gradients=host,optimizer=disk", "parameters=disk,gradients=disk"]
)
def test_held_bytes_are_what_the_plan_counts(offload: str, accumulation: int) -> None:
    config = make_config(offload=offload, gradient_accumulation_steps=accumulation, activation_checkpointing="full")
    model_config = deep("llama", 4)
    model_config.vocab_size = model_config.hidden_size = 256  # matrices that are whole pages, and large
    plans, batch = Plans(model_config), Batch(1, 8)
    resting, planned = held_bytes(config, plans.facts(8)), plans.of(config, batch)
    assert planned["peak_bytes"] >= resting["device"]
    components = planned["components"]
    if "parameters" not in offload:
        found = sum(components[name] for name in ("parameters", "gradients", "optimizer_states"))
        assert found == resting["device"]
    # On disk each tensor is rounded up to pages; layers that are streamed pass through memory on their way.
    assert resting["disk"] <= planned["disk_bytes"] <= 1.05 * resting["disk"]
    assert resting["host"] == planned["host_bytes"]
