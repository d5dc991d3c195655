"""Flags of the plan are refused without it, and a plan needs no empty output folder."""

from pathlib import Path

import pytest

from fullft.config.parse import parse_config
from fullft.errors import OptionsError


def test_plan_flags_are_refused_without_a_plan() -> None:
    with pytest.raises(OptionsError) as refusal:
        parse_config(["--json", "--gpu_hour_price", "3", "--device_memory", "much"])
    for flag in ("--json", "--gpu_hour_price"):
        assert f"{flag} does nothing without --plan" in str(refusal.value)
    assert "device_memory: 'much' is no amount of memory" in str(refusal.value)
    Path("full-ft-demo").mkdir()
    Path("full-ft-demo", "notes.txt").touch()
    parse_config(["--plan", "--json", "--output_dir", "full-ft-demo"])  # a plan writes nothing there
