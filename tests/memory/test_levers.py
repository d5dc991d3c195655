"""Each lever saves the bytes that it states."""

from dataclasses import replace

import pytest
from models import make_config
from worst_steps import deep

from fullft.memory.choose import Plans
from fullft.memory.levers import ALL, find_levers
from fullft.memory.machine import Device
from fullft.memory.plan import Batch, plan_step


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 4, "isolates_documents": True},
        {"micro_batch_tokens": 384, "gradient_accumulation_steps": 16},
        {"precision": "fp32", "activation_checkpointing": "every_2"},
    ],
    ids=str,
)
def test_levers_save_the_bytes_that_they_state(options: dict[str, object]) -> None:
    """A plan with the lever's own flags has the bytes that it states."""
    config = make_config(activation_checkpointing="none") if "precision" not in options else make_config()
    config = replace(config, **options)
    model_config = deep("llama", 3)
    model_config.vocab_size, model_config.hidden_size = 64, 256  # large matrices, to be worth 8 bits
    plans, batch = Plans(model_config), Batch(config.per_device_train_batch_size, 256, 256)
    peak = plan_step(config, model_config, batch.under(config))["peak_bytes"]
    levers = find_levers(config, plans, batch, Device("mine", 2**40))
    assert len(levers) > 3 and levers[-1].flags == ALL
    times = [lever.time for lever in levers if lever.flags.endswith("selective")]
    assert times == (["about +10%"] if config.activation_checkpointing == "none" else [])
    every: list[str] = []
    for lever in levers:
        words = lever.flags.split() if lever.flags != ALL else every
        if lever.price.startswith("accumulate"):
            words = [*words, "--gradient_accumulation_steps", lever.price.split()[1]]
        every += words
        changes = {word[2:]: value for word, value in zip(words[::2], words[1::2], strict=True)}
        numbers = {name: int(value) if value.isdigit() else value for name, value in changes.items()}
        length = numbers.pop("max_length", None) or batch.length
        if config.micro_batch_tokens and length < batch.length:  # the plan may choose as many tokens then
            numbers["micro_batch_tokens"] = length
        lowered = replace(config, **numbers)
        if "parameters" in lowered.offload:
            lowered = replace(lowered, activation_checkpointing="full")  # as resolving does, unless it is given
        rows = Batch(lowered.per_device_train_batch_size, length, length)
        anew = plan_step(lowered, model_config, rows.under(lowered))
        assert anew["peak_bytes"] == lever.peak_bytes == peak - lever.saved_bytes
