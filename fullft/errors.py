"""Errors that a user can act on: exit codes, and the one place where an exception becomes one or two lines on stderr.

Imports nothing heavy, since it must be in place before torch is.
"""

import errno
import os
import re
import signal
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path


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
        super().__init__(message)
        self.exit_code = 128 + signal_number

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        """Return what `pickle` makes a copy from, for other ranks."""
        return StoppedBySignal, (str(self), self.exit_code - 128)


def general_advice() -> str:
    """Say what usually helps when memory runs out."""
    return (
        "cheapest remedies: --activation_checkpointing full, a smaller --micro_batch_tokens or --max_length, "
        "--optim adamw_8bit"
    )


_advice: ContextVar[Callable[[], str]] = ContextVar("advice", default=general_advice)


@contextmanager
def out_of_memory_advice(advice: Callable[[], str]) -> Iterator[None]:
    """Add this advice to out-of-memory errors raised in the body.

    Args:
        advice: says what to do; called when the error occurs.

    Raises:
        MemoryExhaustedError: in place of such an error.
    """
    token = _advice.set(advice)
    try:
        yield
    except Exception as error:
        user_error = as_user_error(error)
        if isinstance(user_error, MemoryExhaustedError):
            raise user_error from error
        raise
    finally:
        _advice.reset(token)


_OUT_OF_MEMORY = re.compile("out of memory|DefaultCPUAllocator|cannot allocate memory|ALLOC_FAILED", re.IGNORECASE)
_UNUSED = re.compile(r"([\d.]+ GiB) is reserved by PyTorch but unallocated")  # near the end of CUDA's long message
# What a write can meet; reading code names missing files itself.
_DISK_ERRNOS = {
    getattr(errno, name)
    for name in "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EIO ENOENT ENOTDIR EISDIR ENAMETOOLONG EMFILE ESTALE".split()
    if hasattr(errno, name)
}
_TEXT_LIMIT = 300  # characters of a library's message


def _fragmentation_advice(message: str) -> str:
    """Say how to join memory that is held in pieces. torch does not by default: drivers of WSL fail at it."""
    unused = _UNUSED.search(message)
    if unused is None:
        return ""
    return f"{unused[1]} of it is held in pieces: PYTORCH_ALLOC_CONF=expandable_segments:True joins them; "


def as_user_error(error: BaseException) -> FullftError:
    """Translate what libraries raise late in a run; anything unknown becomes exit code 1.

    Args:
        error: any exception.
    """
    if isinstance(error, FullftError):
        return error
    text = " ".join(str(error).split())
    text = text if len(text) <= _TEXT_LIMIT else f"{text[:_TEXT_LIMIT]} ..."
    if isinstance(error, KeyboardInterrupt):
        return StoppedBySignal("interrupted; the checkpoints saved so far are intact", signal.SIGINT)
    if isinstance(error, ImportError) and error.name:
        return FullftError(
            f"the Python package {error.name.split('.')[0]} is missing or broken ({text})\n"
            "reinstall fullft with pip, or run `make train` in a checkout, which sets up all that is needed"
        )
    # By text, because torch is not imported here, and each of its backends has a class of its own for this.
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(f"{type(error).__name__} {text}"):
        advice = f"{_fragmentation_advice(str(error))}{_advice.get()()}"
        return MemoryExhaustedError(f"out of memory: {text or type(error).__name__}\n{advice}")
    if (cache := _cache_of(error)) is not None:
        return _cache_error(text, *cache)
    # Libraries written in Rust (safetensors, tokenizers) report a full disk in the text of a class of their own.
    if (isinstance(error, OSError) and error.errno in _DISK_ERRNOS) or "(os error " in text:
        return DiskError(
            f"cannot read or write: {text}\nfree some space or choose another --output_dir; if a checkpoint has been "
            "saved, --resume_from_checkpoint continues from it"
        )
    return FullftError(f"unexpected {type(error).__name__}: {text}\n--debug shows the traceback")


# Where Hugging Face's libraries keep what they have downloaded or prepared, by what moves it; HF_HOME moves all.
_CACHES = ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_MODULES_CACHE", "HF_HOME")
_FULL_ERRNOS = {getattr(errno, name) for name in "ENOSPC EDQUOT EFBIG".split() if hasattr(errno, name)}
# A file that is missing from a cache is another matter.
_CACHE_ERRNOS = (_DISK_ERRNOS | {errno.EEXIST}) - {errno.ENOENT}


def _caches() -> dict[str, Path]:
    """Return the folders of the caches, by the variable that moves each."""
    # Source: huggingface_hub, constants.py.
    home = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "huggingface")
    named = {"HF_HOME": home} | {name: os.environ[name] for name in _CACHES if os.environ.get(name)}
    return {name: Path(os.path.expanduser(named[name])) for name in _CACHES if name in named}


def _cache_of(error: BaseException) -> tuple[str, Path] | None:
    """Return the cache that an error is about, and the variable that moves it; None if it is about none."""
    if not isinstance(error, OSError) or error.errno not in _CACHE_ERRNOS or not isinstance(error.filename, str):
        return None
    file = Path(error.filename).absolute()
    for name, folder in _caches().items():
        if file.is_relative_to(folder.absolute()) or Path(os.path.realpath(file)).is_relative_to(
            os.path.realpath(folder)
        ):
            return name, folder
    return None


def _cache_error(text: str, name: str, folder: Path) -> DiskError:
    return DiskError(
        f"cannot write the cache of Hugging Face's libraries, {folder}: {text}\n"
        f"free some space there, or move it: {name}=<a folder that can be written>"
    )


def exhaustion(error: BaseException) -> FullftError | None:
    """Recognise memory running out, or a cache that cannot be written, in an error or in its causes.

    For code that blames other things, and that writes nothing but caches: a full disk is then theirs.

    Args:
        error: any exception.
    """
    cause: BaseException | None = error
    while cause is not None:
        found = as_user_error(cause)
        if isinstance(found, MemoryExhaustedError) or _cache_of(cause) is not None:
            return found
        if isinstance(cause, OSError) and cause.errno in _FULL_ERRNOS or "(os error 28)" in str(cause):
            # Most writes do not say where.
            is_elsewhere = isinstance(cause, OSError) and cause.filename is not None
            return found if is_elsewhere else _cache_error(str(cause), *next(iter(_caches().items())))
        cause = cause.__cause__ or cause.__context__
    return None


Teller = Callable[[BaseException, FullftError, str], int]


def _tell_user(error: BaseException, user_error: FullftError, before: str) -> int:
    print(f"{before}error: {user_error}", file=sys.stderr)
    return user_error.exit_code


_tell: Teller = _tell_user


def tell_through(teller: Teller) -> None:
    """Let something else print what is reported: under several ranks the first one speaks for all.

    Args:
        teller: gets the exception, what it means to the user, and what comes before the message, such as a traceback.
            It returns the exit code, or ends the process.
    """
    global _tell
    _tell = teller


def _report(error: BaseException, debug: bool) -> int:
    """Have the error printed, and return the exit code."""
    before = "\n" if isinstance(error, KeyboardInterrupt) else ""  # the terminal has just shown ^C
    if debug and not isinstance(error, StoppedBySignal):
        before = "".join(traceback.format_exception(error)) + before
    return _tell(error, as_user_error(error), before)


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
        sys.exit(_report(error, debug))


def report_uncaught_errors(debug: bool) -> None:
    """Report errors outside of `report_errors` in the same way, such as a missing package or Ctrl-C during imports.

    Args:
        debug: let the traceback through as well.
    """

    def report(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        # SystemExit out of the hook sets the exit code, which would otherwise be 1.
        sys.exit(_report(error, debug))

    sys.excepthook = report
