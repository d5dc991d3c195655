"""Errors: exit codes, and the one or two lines that a user reads."""

import pytest
import torch
from fork_server import run_code

from fullft.errors import (
    MemoryExhaustedError,
    ModelError,
    as_user_error,
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
        (RuntimeError("CUDA error: out of memory"), 8, ["--per_device_train_batch_size"]),
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
