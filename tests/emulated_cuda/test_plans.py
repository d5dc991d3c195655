"""A plan for a card is the same on a machine without one."""

import pytest
import torch
from models import make_config
from worst_steps import deep

from emulated_cuda.runs import without_device
from fullft.memory.plan import Batch, plan_step, planned_device_type
from fullft.storage import locked

pytestmark = pytest.mark.emulated


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"precision": "bf16-true", "packing": True}),
        ("gpt2", {"precision": "bf16-mixed", "activation_checkpointing": "every_2"}),
        ("qwen2", {"optim": "adamw_8bit", "offload": "optimizer=host,gradients=host"}),
        ("gemma2", {"offload": "optimizer=disk,gradients=disk,parameters=disk", "activation_checkpointing": "full"}),
    ],
)
def test_plan_is_the_same_without_the_card(
    family: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    model_config, batch = deep(family, 4), Batch(2, 24, 16)
    with_card = plan_step(make_config(**options), model_config, batch)
    assert planned_device_type(make_config()) == "cuda"
    with without_device(), monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        locked.can_register.cache_clear()
        planned = plan_step(make_config(plan=True, device_memory="24GiB", **options), model_config, batch)
        on_cpu = plan_step(make_config(**options), model_config, batch)
    locked.can_register.cache_clear()
    assert planned == with_card != on_cpu
