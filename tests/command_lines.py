"""Command lines and files of the tests of options."""

from pathlib import Path

import pytest

from fullft.config.parse import parse_config
from fullft.errors import OptionsError

MODEL = ["--model", "mistralai/Mistral-7B-v0.1"]


def problems_of(*words: str) -> list[str]:
    """Return the lines that answer a wrong command line."""
    with pytest.raises(OptionsError) as refusal:
        parse_config(words)
    assert refusal.value.exit_code == 2
    return [line.strip() for line in str(refusal.value).splitlines()]


def write_yaml(text: str | bytes, name: str = "run.yaml") -> str:
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name
