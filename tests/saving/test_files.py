"""Files: written whole or not at all."""

import os
from pathlib import Path

import pytest

from fullft.saving.files import write_text


def test_a_text_is_replaced_whole_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(Path("log.jsonl"), "old")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError):
        write_text(Path("log.jsonl"), "new")
    assert Path("log.jsonl").read_text() == "old"
