"""What the tests of saving start from: an empty folder, or an earlier run in it."""

import shutil
from pathlib import Path

import pytest
from small_runs import OUT, contents, train_small


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps with checkpoint-1 and checkpoint-2."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    train_small(output_dir=folder, save_steps=1)
    return folder


@pytest.fixture
def earlier(finished: Path) -> dict[str, bytes]:
    """The same run in `out`: its files and their contents."""
    shutil.copytree(finished, OUT)
    return contents(OUT)
