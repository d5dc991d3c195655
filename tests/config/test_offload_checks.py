"""What `--offload` cannot mean is refused, each with its remedy."""

from pathlib import Path

import pytest

from fullft.config.parse import parse_config
from fullft.errors import OptionsError


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (
            "--offload gradients=released --max_grad_norm 0",
            ["nothing accumulates: add --gradient_accumulation_steps 1"],
        ),
        (
            "--offload gradients=released --max_grad_norm 0 --global_batch_size 8 --per_device_train_batch_size 4",
            ["nothing accumulates"],
        ),
        (
            "--offload gradients=released --gradient_accumulation_steps 1",
            ["before the global norm is known: add --max_grad_norm 0, or keep them with gradients=host"],
        ),
        ("--offload gradients=released", ["nothing accumulates", "before the global norm is known"]),
        ("--offload optimizer=host --optim paged_adamw_8bit", ["leave out optimizer=host"]),
        ("--offload parameters=host --activation_checkpointing none", ["add --activation_checkpointing full"]),
        ("--offload optimizer=released", ["'optimizer=released' is neither none nor one of"]),
        ("--offload optimizer=host,optimizer=disk", ["optimizer is placed twice"]),
        ("--offload everything", ["'everything' is neither none nor one of"]),
    ],
)
def test_impossible_placements_are_refused_with_their_remedies(words: str, messages: list[str], tmp_path: Path) -> None:
    with pytest.raises(OptionsError) as refusal:
        parse_config(["--model", "x", "--output_dir", str(tmp_path), *words.split()])
    lines = str(refusal.value).splitlines()
    assert len(lines) == len(messages)
    for line, message in zip(lines, messages, strict=True):
        assert message in line


def test_possible_placements_are_accepted(tmp_path: Path) -> None:
    words = ["--model", "x", "--output_dir", str(tmp_path)]
    alone = ["--gradient_accumulation_steps", "1", "--max_grad_norm", "0"]
    assert parse_config([*words, *alone, "--offload", "gradients=released"]).offload == "gradients=released"
    assert parse_config([*words, "--offload", "optimizer=disk", "gradients=host"]).offload == (
        "optimizer=disk,gradients=host"
    )
