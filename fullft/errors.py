"""Errors that a user can act on, and how a run ends.

Owns the exit codes and the one place where an exception becomes one or two lines on stderr. Imports nothing
heavy: it is in place before torch is. Knows nothing about what raises.
"""

import errno
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class FullftError(Exception):
    """An error with a message for the user: the item, the cause, the remedy."""

    exit_code = 1


class OptionsError(FullftError):
    """An option is unknown, out of range, or contradicts another (exit 2)."""

    exit_code = 2


class DataError(FullftError):
    """The data set cannot be found, read or understood (exit 3)."""

    exit_code = 3


class ModelError(FullftError):
    """The model or its tokenizer cannot be found, read or trained (exit 4)."""

    exit_code = 4


class CheckpointError(FullftError):
    """A checkpoint is missing, damaged, or belongs to another run (exit 5)."""

    exit_code = 5


class DiskError(FullftError):
    """A file cannot be written (exit 6)."""

    exit_code = 6


class NonFiniteError(FullftError):
    """A loss or gradient is NaN or infinite (exit 7)."""

    exit_code = 7


class MemoryExhaustedError(FullftError):
    """The run needs more memory than there is (exit 8)."""

    exit_code = 8


class StoppedBySignal(FullftError):
    """A signal ended the run (exit 128 + signal, as shells report it)."""

    def __init__(self, message: str, signal_number: int) -> None:
        """Keep the message, and derive the exit code from the signal's number."""
        super().__init__(message)
        self.exit_code = 128 + signal_number


_DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def _as_user_error(error: BaseException) -> FullftError:
    """Translate what libraries raise late in a run; anything unknown becomes exit code 1."""
    text = " ".join(str(error).split())
    if isinstance(error, FullftError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return StoppedBySignal("interrupted before a step was finished; nothing was saved", signal.SIGINT)
    # By name, because torch is not imported here: torch.OutOfMemoryError, and what its CPU allocator raises.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in text:
        return MemoryExhaustedError(
            f"out of memory: {text[:200]}\n"
            "cheapest remedies: --activation_checkpointing full, a smaller --per_device_train_batch_size or "
            "--max_length, --optim adamw_8bit"
        )
    # safetensors reports a full disk in the text of an error class of its own.
    if (isinstance(error, OSError) and error.errno in _DISK_ERRNOS) or "os error 28" in text.lower():
        return DiskError(f"cannot write: {text}\nfree some space or choose another --output_dir, then resume")
    return FullftError(f"unexpected {type(error).__name__}: {text[:300]}\n--debug shows the traceback")


@contextmanager
def report_errors(debug: bool) -> Iterator[None]:
    """End the process with the right exit code and a short message when the body fails.

    Args:
        debug: let the traceback through as well.

    Raises:
        SystemExit: with the exit code of the error.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if debug and not isinstance(error, StoppedBySignal):
            import traceback

            traceback.print_exc()
        user_error = _as_user_error(error)
        print(f"\nerror: {user_error}", file=sys.stderr)
        sys.exit(user_error.exit_code)
