"""Arrays on disk: a file without a name, read and written past the page cache.

The file system's cache slows writing down to a fifth: docs/internals/files.md has the measurements.
"""

import errno
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

import torch

from fullft.errors import DiskError
from fullft.storage.locked import locked_block

PAGE = 4096  # bytes; direct I/O wants addresses, offsets and lengths that are multiples of it


def paged(num_bytes: int) -> int:
    """Round up to whole pages."""
    return -(-num_bytes // PAGE) * PAGE


def aligned_bytes(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Allocate uninitialised host memory that starts at a page, as direct I/O wants.

    Args:
        num_bytes: its size.
        device: that data moves to and from.
    """
    if device.type != "cpu":
        return locked_block(num_bytes)
    memory = torch.empty(num_bytes + PAGE, dtype=torch.uint8)
    start = -memory.data_ptr() % PAGE
    return memory[start : start + num_bytes]


class DiskArray:
    """A flat array in a file: no tensor, but read and written in chunks that are.

    Args:
        file: the file that holds it.
        offset: where it starts, in bytes; a multiple of a page.
        numel: its number of elements.
        dtype: of an element.
    """

    def __init__(self, file: "DiskFile", offset: int, numel: int, dtype: torch.dtype) -> None:
        self.file, self.offset, self.dtype = file, offset, dtype
        self.shape = torch.Size([numel])

    def numel(self) -> int:
        """Return the number of elements."""
        return self.shape[0]

    def element_size(self) -> int:
        """Return the bytes of an element."""
        return self.dtype.itemsize

    def read(self, start: int, count: int, target: torch.Tensor) -> None:
        """Read elements.

        Args:
            start: the first element; at a page boundary.
            count: how many elements.
            target: [whole pages] uint8, page-aligned, on the CPU.

        Raises:
            DiskError: the file is shorter than it was.
            OSError: it cannot be read.
        """
        self.file.transfer(os.preadv, self._offset(start), target[: paged(count * self.dtype.itemsize)])

    def write(self, start: int, count: int, source: torch.Tensor) -> None:
        """Write elements; the rest of their last page is padding.

        Args:
            start: the first element; at a page boundary.
            count: how many elements.
            source: [whole pages] uint8, page-aligned, on the CPU.

        Raises:
            OSError: the disk is full or cannot be written.
        """
        self.file.transfer(os.pwritev, self._offset(start), source[: paged(count * self.dtype.itemsize)])

    def _offset(self, start: int) -> int:
        return self.offset + start * self.dtype.itemsize


class DiskFile:
    """A file without a name, which not even a killed run leaves behind. Its space is taken as arrays are made.

    Args:
        folder: on the disk to use. Where it does not exist yet, the nearest folder above it that does takes its place.
    """

    def __init__(self, folder: Path) -> None:
        self.num_bytes = 0
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
        self._file = tempfile.TemporaryFile(dir=existing, prefix=".fullft-offload-")
        set_direct(self._file, True)

    def allocate(self, numel: int, dtype: torch.dtype) -> DiskArray:
        """Make an array of zeros, and take its space.

        Args:
            numel: its number of elements.
            dtype: of an element.

        Raises:
            DiskError: the disk has less room.
        """
        array = DiskArray(self, self.num_bytes, numel, dtype)
        size = paged(numel * dtype.itemsize)
        if size:
            self._take_space(size)
        self.num_bytes += size
        return array

    def _take_space(self, size: int) -> None:
        try:
            self._extend(size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise DiskError(
                f"offload: there is no room for {(self.num_bytes + size) / 1e9:.1f} GB next to the output folder "
                f"({error.strerror}): free some space, choose an --output_dir on another disk, or offload less"
            ) from error

    def _extend(self, size: int) -> None:
        """Make the file longer, by space that exists."""
        descriptor = self._file.fileno()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, self.num_bytes, size)
            return
        os.ftruncate(descriptor, self.num_bytes + size)  # macOS takes space as it is written
        if size > os.fstatvfs(descriptor).f_bavail * os.fstatvfs(descriptor).f_frsize:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def transfer(self, operation: Callable[..., int], offset: int, memory: torch.Tensor) -> None:
        """Read or write all bytes of a piece of memory.

        Args:
            operation: `os.preadv` or `os.pwritev`.
            offset: in the file.
            memory: [bytes] uint8 on the CPU.
        """
        view, done = memory.numpy().data, 0
        while done < len(view):
            count = operation(self._file.fileno(), [view[done:]], offset + done)
            if count == 0:
                raise DiskError(
                    "the file that --offload keeps on disk is shorter than it was written: its disk is failing, or it "
                    "was truncated; --resume_from_checkpoint continues from the last checkpoint"
                )
            done += count


def set_direct(file: IO[bytes], is_direct: bool) -> None:
    """Switch a file between direct I/O, past the page cache, and ordinary I/O.

    Args:
        file: unbuffered, or used by its descriptor alone. Some file systems have no way past.
        is_direct: then addresses, offsets and lengths are to be whole pages.
    """
    with suppress(ImportError, OSError):
        import fcntl  # not on Windows

        flags, direct = fcntl.fcntl(file, fcntl.F_GETFL), getattr(os, "O_DIRECT", 0)
        fcntl.fcntl(file, fcntl.F_SETFL, flags | direct if is_direct else flags & ~direct)
