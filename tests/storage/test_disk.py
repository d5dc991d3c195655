"""Arrays on disk: what is written is read back, and a disk that fails ends the run with exit code 6."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_config, optimizer_of
from small_runs import contents, train_small
from trajectories import content, odd_model, steps

from fullft.errors import DiskError, report_errors
from fullft.optim.rehearsal import Rehearsal
from fullft.run.log import Log
from fullft.saving.checkpoint import verify
from fullft.storage.disk import DiskArray
from fullft.storage.tiers import Storage, fill


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("numel", [1, 4095, 4096, 4097, 10000])
def test_disk_arrays_start_as_zeros_and_read_back(numel: int, dtype: torch.dtype, tmp_path: Path) -> None:
    storage = Storage(torch.device("cpu"), tmp_path)
    arrays = [storage.zeros("disk", numel, dtype) for _ in range(3)]
    values = torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    assert all(isinstance(array, DiskArray) and array.offset % 4096 == 0 for array in arrays)
    fill(arrays[1], values)
    found = [content(array) for array in arrays]
    assert torch.equal(found[1].view(torch.uint8), values.view(torch.uint8))
    assert not found[0].view(torch.uint8).any() and not found[2].view(torch.uint8).any()


def test_disk_file_has_no_name_and_reserves_space(tmp_path: Path) -> None:
    """Where the output folder does not exist yet, the file is in the nearest one above it."""
    config = make_config(offload="optimizer=disk,gradients=disk", output_dir=tmp_path / "not" / "yet")
    model = odd_model()
    optimizer = optimizer_of(model, config)
    with Rehearsal(optimizer):
        assert os.listdir(tmp_path) == []
    file = optimizer.storage._file
    assert file is not None and file._file is not None
    status = os.fstat(file._file.fileno())
    assert status.st_nlink == 0 and status.st_dev == os.stat(tmp_path).st_dev
    assert status.st_size == optimizer.storage.disk_bytes
    assert 512 * status.st_blocks >= status.st_size > 10 * sum(parameter.numel() for parameter in model.parameters())
    steps(model, optimizer, config, 1, 1)
    assert os.listdir(tmp_path) == []


def test_truncated_disk_file_raises_an_error(tmp_path: Path) -> None:
    config = make_config(offload="optimizer=disk", output_dir=tmp_path, gradient_accumulation_steps=1)
    model = odd_model()
    optimizer = optimizer_of(model, config)
    steps(model, optimizer, config, 1, 1)
    file = optimizer.storage._file
    assert file is not None and file._file is not None
    os.ftruncate(file._file.fileno(), file.num_bytes // 2)
    with pytest.raises(DiskError, match="shorter than it was written.*--resume_from_checkpoint") as error:
        steps(model, optimizer, config, 2, 2)
    assert error.value.exit_code == 6


# ---------------------------------------------------------------------------------------------- a run


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A resident run of the demo, of two steps, with checkpoint-2."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    train_small(output_dir=folder, max_steps=2)
    return folder


@pytest.fixture(scope="module")
def resumed(finished: Path) -> Path:
    """The same run, resumed on the device up to checkpoint-4."""
    folder = finished.parent / "resumed"
    shutil.copytree(finished, folder)
    train_small(**RESUMED, offload="none", output_dir=folder)
    return folder


RESUMED = {"resume_from_checkpoint": "newest", "allow_changes": True, "max_steps": 4}


def failing_writes(error: int, after_step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make writes past the page cache fail after so many steps."""
    done: list[int] = []
    logged, written = Log.step, os.pwritev

    def log(self: Log, step: int, *arguments: Any) -> None:
        done.append(step)
        logged(self, step, *arguments)

    def write(*arguments: Any) -> int:
        if after_step in done:
            raise OSError(error, os.strerror(error))
        return written(*arguments)

    monkeypatch.setattr(Log, "step", log)
    monkeypatch.setattr(os, "pwritev", write)


@pytest.mark.parametrize(
    ("placement", "error"), [("optimizer=disk", errno.ENOSPC), ("gradients=disk", errno.EIO)], ids=str
)
def test_failing_disk_is_exit_6_and_keeps_checkpoints(
    placement: str,
    error: int,
    finished: Path,
    resumed: Path,
    in_empty_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(finished, "out")
    before = contents(Path("out/checkpoint-2"))
    with monkeypatch.context() as patch:
        failing_writes(error, 3, patch)
        with pytest.raises(SystemExit) as end, report_errors(debug=False):
            train_small(**RESUMED, offload=placement)
    assert end.value.code == 6
    cause, remedy = capfd.readouterr().err.splitlines()[-2:]
    assert cause.startswith("error: cannot read or write") and "--resume_from_checkpoint" in remedy
    assert contents(Path("out/checkpoint-2")) == before and verify(Path("out/checkpoint-2")).state["step"] == 2
    assert not Path("out/checkpoint-4").exists() and not list(Path("out").glob(".*"))
    # The run continues from there, and ends where a resident run does.
    train_small(**RESUMED, offload=placement)
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert Path("out/checkpoint-4", file).read_bytes() == (resumed / "checkpoint-4" / file).read_bytes()


def test_full_disk_is_exit_6_before_any_write(
    finished: Path, in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, "out")
    before = contents(Path("out"))

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(SystemExit) as end, report_errors(debug=False):
        train_small(**RESUMED, offload="optimizer=disk")
    assert end.value.code == 6
    last = capfd.readouterr().err.splitlines()[-1]
    assert "there is no room for" in last and "No space left on device" in last and "--output_dir" in last
    assert contents(Path("out")) == before
