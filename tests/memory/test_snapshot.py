"""A recording of allocations gets its name when an earlier one has been set aside, or at once where the step fails."""

from pathlib import Path

import pytest
import torch

from fullft.memory import snapshot
from fullft.saving import output_dir


@pytest.fixture
def pretended_cuda(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """An allocator that records nothing, but writes."""
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **_: None)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda file: Path(file).write_text("recorded"))
    return torch.device("cuda")


def test_recording_waits_until_the_earlier_one_is_aside(pretended_cuda: torch.device, tmp_path: Path) -> None:
    """The worst step comes before the earlier run's files move: its recording must not move with them."""
    earlier = tmp_path / snapshot.SNAPSHOT
    earlier.write_text("earlier")
    with snapshot.recording(pretended_cuda, tmp_path):
        pass
    assert earlier.read_text() == "earlier"
    assert output_dir._own_files(tmp_path) == [Path(snapshot.SNAPSHOT)]  # --overwrite_output_dir replaces it
    earlier.unlink()
    snapshot.publish_recording(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [snapshot.SNAPSHOT]
    assert earlier.read_text() == "recorded"


def test_recording_of_a_failure_is_named_at_once(pretended_cuda: torch.device, tmp_path: Path) -> None:
    with pytest.raises(MemoryError), snapshot.recording(pretended_cuda, tmp_path / "new"):
        raise MemoryError
    assert [file.name for file in (tmp_path / "new").iterdir()] == [snapshot.SNAPSHOT]
