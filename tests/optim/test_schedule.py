"""The learning rate of each step is that of transformers' schedules."""

import pytest
import torch
from models import make_config
from transformers import get_scheduler

from fullft.optim.schedule import build_schedule


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup"])
@pytest.mark.parametrize(("warmup", "warmup_count"), [(0, 0), (3, 3), (0.25, 5)])
def test_schedule_equals_that_of_transformers(name: str, warmup: float, warmup_count: int) -> None:
    config = make_config(lr_scheduler_type=name, warmup_steps=warmup, learning_rate=3e-4)
    learning_rate_at = build_schedule(config, total_steps=20)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=3e-4)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup_count, num_training_steps=20)
    for step in range(1, 21):
        assert learning_rate_at(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_linear_schedule_starts_at_the_full_rate() -> None:
    assert build_schedule(make_config(learning_rate=2e-5), total_steps=10)(1) == 2e-5


def test_constant_schedule_takes_a_warmup() -> None:
    rates = build_schedule(make_config(lr_scheduler_type="constant", warmup_steps=4, learning_rate=1.0), 10)
    assert [rates(step) for step in (1, 2, 5, 10)] == [0.0, 0.25, 1.0, 1.0]
