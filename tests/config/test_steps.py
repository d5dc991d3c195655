"""Steps: how many there are, and at which of them something is due."""

from typing import Any

import pytest
from models import make_config

from fullft.config.steps import Steps


@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({"num_train_epochs": 3.0}, 30),
        ({"num_train_epochs": 0.01}, 1),
        ({"num_train_epochs": 1.25}, 13),
        ({"num_train_epochs": 3.0, "max_steps": 7}, 7),
    ],
)
def test_the_total_follows_from_epochs_or_max_steps(options: dict[str, Any], total: int) -> None:
    assert Steps(make_config(**options), steps_per_epoch=10).total == total


@pytest.mark.parametrize(
    ("strategy", "evaluated", "saved"),
    [("no", [23], []), ("epoch", [10, 20, 23], [10, 20, 23]), ("steps", [4, 8, 12, 16, 20, 23], [7, 14, 21, 23])],
)
def test_what_is_due_follows_the_strategy(strategy: str, evaluated: list[int], saved: list[int]) -> None:
    config = make_config(
        max_steps=23, eval_strategy=strategy, eval_steps=4, save_strategy=strategy, save_steps=7, logging_steps=9
    )
    steps = Steps(config, steps_per_epoch=10)
    every = range(1, 24)
    assert [step for step in every if steps.evaluation_due(step)] == evaluated
    assert [step for step in every if steps.checkpoint_due(step)] == saved
    assert steps.num_checkpoints == len(saved)
    assert [step for step in every if steps.log_due(step)] == [1, 9, 18, 23]
    assert steps.epoch(15) == 1.5
