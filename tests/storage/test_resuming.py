"""A checkpoint of any placement continues in any other, to the bit."""

from pathlib import Path

import pytest
import torch
from models import make_config, optimizer_of
from trajectories import odd_model, steps
from transformers import PreTrainedTokenizerBase

from fullft.config.config import Config
from fullft.config.steps import Steps
from fullft.model.load import load_model
from fullft.saving.checkpoint import save_checkpoint, verify
from fullft.saving.resuming import restore
from fullft.storage.tiers import Storage

EVERYWHERE = ["none", "optimizer=host", "optimizer=disk", "gradients=disk", "optimizer=disk,gradients=host"]
MASTERS = ["split", "stochastic", "none"]


# Each pair of placements with one kind of masters; the slow thirds are each pair with the two others.
@pytest.mark.parametrize("masters", MASTERS)
@pytest.mark.parametrize(
    "third",
    [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)],
    ids="third {}".format,
)
def test_resumed_run_equals_the_uninterrupted_one_bitwise(
    third: int, masters: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    def config_of(place: str, folder: str) -> Config:
        return make_config(
            master_weights=masters,
            offload=place,
            output_dir=tmp_path / folder,
            gradient_accumulation_steps=2,
            weight_decay=0.1,
        )

    config = config_of("none", "whole")
    model = odd_model()
    whole = steps(model, optimizer_of(model, config), config, 1, 4)
    for number, begun in enumerate(EVERYWHERE):
        config = config_of(begun, f"begun-{number}")
        model = odd_model()
        optimizer = optimizer_of(model, config)
        steps(model, optimizer, config, 1, 2)
        folder = save_checkpoint(config, Steps(config, 9), 2, model, tokenizer, optimizer, "rows")
        for other, continued in enumerate(EVERYWHERE):
            if (number + other + third) % len(MASTERS) != MASTERS.index(masters):
                continue
            config = config_of(continued, f"begun-{number}")
            storage = Storage(torch.device("cpu"), tmp_path)
            model = load_model(config, str(folder), storage)
            optimizer = optimizer_of(model, config)
            assert restore(verify(folder), config, Steps(config, 9), model, optimizer, "rows") == 2
            resumed = steps(model, optimizer, config, 3, 4)
            assert (resumed.losses, resumed.norms) == (whole.losses[4:], whole.norms[2:])
            assert resumed.differing(whole) == [], (begun, continued)


def test_resuming_without_the_step_count_changes_the_run(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """The negative control."""
    config = make_config(output_dir=tmp_path, gradient_accumulation_steps=1)
    model = odd_model()
    optimizer = optimizer_of(model, config)
    steps(model, optimizer, config, 1, 2)
    folder = save_checkpoint(config, Steps(config, 9), 2, model, tokenizer, optimizer, "rows")
    whole = steps(model, optimizer, config, 3, 4)
    model = load_model(config, str(folder), Storage(torch.device("cpu"), tmp_path))
    optimizer = optimizer_of(model, config)
    restore(verify(folder), config, Steps(config, 9), model, optimizer, "rows")
    optimizer.num_steps = 0
    assert steps(model, optimizer, config, 3, 4) != whole
