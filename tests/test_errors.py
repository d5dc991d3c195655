"""Errors: exit codes, and the one or two lines that a user reads."""

import errno
import os
from pathlib import Path

import datasets
import pytest
import torch
from fork_server import Run, run_code
from models import make_config

from fullft.data.sources import load_rows
from fullft.errors import (
    DiskError,
    MemoryExhaustedError,
    ModelError,
    as_user_error,
    exhaustion,
    general_advice,
    out_of_memory_advice,
    report_errors,
)


@pytest.mark.parametrize(
    ("error", "code", "parts"),
    [
        (KeyboardInterrupt(), 130, ["interrupted"]),
        (MemoryError(), 8, ["out of memory: MemoryError", "--activation_checkpointing full", "--optim adamw_8bit"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), 8, ["20.00 GiB"]),
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.50 GiB of which "
                "1.10 GiB is free. Including non-PyTorch memory, this process has 22.39 GiB memory in use. Of the "
                "allocated memory 18.70 GiB is allocated by PyTorch, and 3.25 GiB is reserved by PyTorch but "
                "unallocated. If reserved but unallocated memory is large try setting ..."
            ),
            8,
            ["2.00 GiB", "3.25 GiB of it", "PYTORCH_ALLOC_CONF=expandable_segments:True", "cheapest remedies"],
        ),
        (RuntimeError("CUDA error: out of memory"), 8, ["--micro_batch_tokens"]),
        (OSError(12, "Cannot allocate memory"), 8, ["out of memory"]),
        (OSError(28, "No space left on device", "f"), 6, ["No space left", "--output_dir"]),
        (PermissionError(13, "Permission denied", "f"), 6, ["Permission denied"]),
        (Exception("I/O error: File too large (os error 27)"), 6, ["File too large"]),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 1, ["torch is missing", "make train"]),
        (ValueError("why\n\n  ever"), 1, ["unexpected ValueError: why ever", "--debug"]),
        (ConnectionResetError(104, "reset"), 1, ["unexpected ConnectionResetError"]),
        (ModelError("as it is"), 4, ["as it is"]),
    ],
)
def test_every_exception_becomes_code_and_message(
    error: BaseException, code: int, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end, report_errors(debug=False):
        raise error
    message = capsys.readouterr().err.strip()
    assert end.value.code == code
    assert message.startswith("error: ") and len(message.splitlines()) <= 2
    assert all(part in message for part in parts), message


def test_advice_of_its_own_holds_within_its_body() -> None:
    asked: list[str] = []

    def advice(text: str) -> str:
        asked.append(text)
        return text

    with out_of_memory_advice(lambda: advice("outer")):
        with pytest.raises(MemoryExhaustedError, match="out of memory: MemoryError\ninner"):
            with out_of_memory_advice(lambda: advice("inner")):
                raise MemoryError
        with pytest.raises(MemoryExhaustedError, match="\nouter"), out_of_memory_advice(lambda: advice("outer")):
            raise RuntimeError("CUDA error: out of memory")
        assert "outer" in str(as_user_error(MemoryError()))
        with pytest.raises(ValueError, match="why"), out_of_memory_advice(lambda: advice("unasked")):
            raise ValueError("why")  # nothing else is changed
    assert asked == ["inner", "outer", "outer"]
    assert general_advice() in str(as_user_error(MemoryError()))


def test_memory_that_torch_cannot_get_is_exit_8() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 50)
    assert as_user_error(error.value).exit_code == 8


# ---------------------------------------------------------------------------------------------- caches


def wrapped(error: BaseException) -> Exception:
    """Raise an error as the cause of the cause of another, and a last one in its handling."""
    try:
        try:
            try:
                raise error
            except BaseException as cause:
                raise RuntimeError("An error occurred while generating the dataset") from cause
        except RuntimeError:
            raise ValueError("something else")  # noqa: B904 (as libraries do)
    except ValueError as outermost:
        return outermost


@pytest.fixture
def no_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home folder, and nothing that moves the caches out of it."""
    for name in ("HF_HOME", "HF_DATASETS_CACHE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.ENOTDIR, errno.EEXIST, errno.EDQUOT])
@pytest.mark.parametrize("name", ["HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", None])
def test_a_cache_that_cannot_be_written_is_named(
    name: str | None, number: int, no_caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = no_caches / ".cache/huggingface"
    if name is not None:
        monkeypatch.setenv(name, "~/moved")
        folder = no_caches / ("moved/huggingface" if name == "XDG_CACHE_HOME" else "moved")
    remedy = "HF_HOME" if name in (None, "XDG_CACHE_HOME") else name
    error = OSError(number, os.strerror(number), str(folder / "json/x.lock"))
    for found in (exhaustion(error), exhaustion(wrapped(error)), as_user_error(error)):
        assert isinstance(found, DiskError) and found.exit_code == 6
        first, second = str(found).splitlines()
        assert f"libraries, {folder}: " in first and os.strerror(number) in first
        assert f"{remedy}=<a folder" in second and "--output_dir" not in second


def test_a_full_disk_without_a_place_is_the_caches(no_caches: Path) -> None:
    for error in (OSError(28, "No space left on device"), Exception("I/O error: (os error 28)")):
        found = exhaustion(wrapped(error))
        assert isinstance(found, DiskError) and "HF_HOME=" in str(found)
        assert str(no_caches / ".cache/huggingface") in str(found)
        assert "--output_dir" in str(as_user_error(error))  # elsewhere in a run


def test_other_files_are_not_the_caches(no_caches: Path) -> None:
    cache = no_caches / ".cache/huggingface"
    for error in (
        FileNotFoundError(2, "No such file", str(cache / "x")),  # not downloaded
        PermissionError(13, "Permission denied", str(no_caches / "rows.jsonl")),
        PermissionError(13, "Permission denied", f"{cache}-of-another"),
        PermissionError(13, "Permission denied"),
        ValueError(str(cache)),
    ):
        assert exhaustion(wrapped(error)) is None
        assert "HF_HOME" not in str(as_user_error(error))
    full = exhaustion(OSError(28, "No space left on device", str(no_caches / "out/x")))
    assert isinstance(full, DiskError) and "HF_HOME" not in str(full)


def test_data_is_not_blamed_for_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / "cache"
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)  # read from there when imported
    (tmp_path / "rows.jsonl").write_text('{"text": "hello"}\n')
    with pytest.raises(DiskError, match=f"libraries, {cache}: .*\n.*HF_DATASETS_CACHE="):
        load_rows(make_config(dataset=str(tmp_path / "rows.jsonl")))


@pytest.mark.slow
def test_a_home_that_cannot_be_written_is_named(run_cold: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run_cold(HF_HOME=str(tmp_path / "file" / "cache"))
    assert done.returncode == 6
    first, second = done.stderr.splitlines()[-2:]
    assert str(tmp_path / "file" / "cache") in first and "HF_HOME=" in second


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    for debug in (False, True):
        with pytest.raises(SystemExit), report_errors(debug):
            raise ModelError("no such model")
        message = capsys.readouterr().err
        assert ("Traceback" in message) is debug and message.endswith("error: no such model\n")


@pytest.mark.parametrize(
    ("statement", "code", "line"),
    [
        ("import torhc", 1, "error: the Python package torhc is missing or broken"),
        ("raise KeyboardInterrupt", 130, "error: interrupted"),
        ("raise ValueError('why')", 1, "error: unexpected ValueError: why"),
    ],
)
def test_errors_during_imports_show_no_traceback(statement: str, code: int, line: str) -> None:
    done = run_code(f"from fullft.errors import report_uncaught_errors; report_uncaught_errors(False)\n{statement}")
    assert done.returncode == code
    assert done.stderr.strip().startswith(line) and "Traceback" not in done.stderr
