"""The learning rate of every step."""

import math
from collections.abc import Callable

import torch
from transformers import get_scheduler

from fullft.config.config import Config


def build_schedule(config: Config, total_steps: int) -> Callable[[int], float]:
    """Build the learning rate as a pure function of the step, so that resuming has nothing to restore.

    Args:
        config: `learning_rate`, `lr_scheduler_type` and `warmup_steps` are read.
        total_steps: optimizer steps of the whole run.

    Returns:
        A function from the step, counted from 1, to its learning rate.
    """
    warmup = config.warmup_steps
    warmup = math.ceil(total_steps * warmup) if warmup < 1 else int(warmup)
    # transformers' `constant` silently ignores a warmup.
    name = "constant_with_warmup" if config.lr_scheduler_type == "constant" else config.lr_scheduler_type
    unused = torch.optim.SGD([torch.zeros(1)], lr=1.0)  # get_scheduler needs an optimizer; we need only its formula
    factor = get_scheduler(name, unused, num_warmup_steps=warmup, num_training_steps=total_steps).lr_lambdas[0]
    return lambda step: config.learning_rate * float(factor(step - 1))
