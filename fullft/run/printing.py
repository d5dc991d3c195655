"""Printing that never ends a run: a pipe's reader may leave, a terminal may close, an encoding may lack characters.

What cannot be shown is dropped or escaped. Files are another matter: an error in writing one ends the run.
"""

import errno
import io
import os
import select
import sys
import warnings
from typing import Any, TextIO, cast

# Nobody reads any longer: `| head` has ended, or the terminal is gone.
_UNREAD = (errno.EPIPE, errno.EIO, errno.ECONNRESET, errno.ESHUTDOWN, errno.EBADF)

# What libraries read when they are imported.
_QUIET = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
}


def keep_printing() -> None:
    """Make `sys.stdout` and `sys.stderr` survive whatever happens to them.

    Streams that are not the process's own, such as a notebook's, are left as they are.
    """
    for number, name in enumerate(("stdout", "stderr"), start=1):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, _nowhere(number))
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, _lasting(stream))


def silence() -> None:
    """Drop what this process prints, its progress bars and its warnings; before libraries are imported.

    For ranks that another one speaks for. Messages on stderr stay.
    """
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)  # so that what C code prints is dropped too
    os.close(null)
    warnings.simplefilter("ignore")
    os.environ |= _QUIET


def _nowhere(number: int) -> TextIO:
    """Open what stands for a stream that was closed from the start."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.fstat(number)
    except OSError:
        os.dup2(null, number)  # else the next file that is opened gets this number, and whatever C code prints
    return os.fdopen(null, "w", encoding="utf-8", errors="backslashreplace")


def _lasting(stream: io.TextIOWrapper) -> TextIO:
    raw = _LastingFile(stream.fileno())
    return io.TextIOWrapper(
        # Under `python -u` nothing is buffered.
        cast(Any, raw) if stream.write_through else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _LastingFile(io.FileIO):
    """A file descriptor to which writing always succeeds.

    Args:
        number: the descriptor, which stays open.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)
        self._has_warned = False

    def write(self, data: Any) -> int:
        """Write all bytes, or as many as can be.

        Returns:
            The number of bytes given, so that nothing is tried again.
        """
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left:
                count = super().write(left)
                if count is None:  # a pipe that does not block, and is full
                    select.select([], [self], [])
                left = left[count or 0 :]
        except OSError as error:
            self._warn(error)
        return size

    def _warn(self, error: OSError) -> None:
        """Say once that text is lost that would be read, as on a full disk."""
        if self.fileno() == 1 and error.errno not in _UNREAD and not self._has_warned:
            self._has_warned = True
            print(f"warning: what is printed is lost: {error.strerror}", file=sys.stderr)
