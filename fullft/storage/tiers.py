"""The tiers: arrays on the device, in the host's memory, or on disk.

The home of a weight is the array that holds it between uses: the parameter itself, or one in another tier.

Moving chunks between tiers is the business of `stream.py`, moving layers that of `transforms/streaming.py`.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

from fullft.errors import OptionsError
from fullft.storage.disk import DiskArray, DiskFile, aligned_bytes, paged
from fullft.storage.locked import locked_zeros
from fullft.storage.workers import Workers

# Elements fetched, updated and stored at a time. A multiple of 64, where torch's fused AdamW may be cut and round
# alike; of the blocks of 8-bit moments; and of the elements of any dtype in a page.
CHUNK = 1 << 22

Array = torch.Tensor | DiskArray

# ---------------------------------------------------------------------------------------------- registries

# Storages in host memory that do not count as the device's, even where the device is a CPU.
_HOST_STORAGES: WeakIdKeyDictionary = WeakIdKeyDictionary()
_HOMES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def is_on_host(tensor: torch.Tensor) -> bool:
    """Return whether `Storage` placed a tensor on the host, rather than on a device that happens to be a CPU."""
    return tensor.untyped_storage() in _HOST_STORAGES


def home_of(parameter: torch.Tensor) -> Array:
    """Return the array that holds a weight between uses: the parameter itself, or this rank's rows of it.

    If its layer is streamed, it is another array.

    Args:
        parameter: a model's.
    """
    home: Array = _HOMES.get(parameter, parameter)
    return local_of(home) if isinstance(home, torch.Tensor) else home


def set_home(parameter: torch.Tensor, home: Array) -> None:
    """Remember where a weight lives from now on.

    Args:
        parameter: a model's; its own memory may then be dropped.
        home: [numel], of the parameter's dtype.
    """
    _HOMES[parameter] = home


def lives_elsewhere(parameter: torch.Tensor) -> bool:
    """Return whether a weight lives outside its own memory."""
    return parameter in _HOMES


# ---------------------------------------------------------------------------------------------- shards


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's rows of a sharded tensor, in memory shared with it; of any other tensor, the tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return rows as part of a tensor that is sharded as another one is; as they are, where that one is whole.

    Args:
        tensor: sharded, or whole.
        rows: this rank's, of the same shape as those of `tensor`.
    """
    if not isinstance(tensor, DTensor):
        return rows
    mesh, placements = tensor.device_mesh, tensor.placements
    return DTensor.from_local(rows, mesh, placements, shape=tensor.shape, stride=tensor.stride())


def row_range(num_rows: int, index: int, count: int) -> tuple[int, int]:
    """Return which rows of a tensor are whose: ceil(n / W) of n for each of W ranks in order, and what is left.

    Args:
        num_rows: n.
        index: of the rank in its group.
        count: W.

    Returns:
        The first row, and the one after the last; the last ranks may have none.
    """
    most = -(-num_rows // count)
    return min(num_rows, index * most), min(num_rows, (index + 1) * most)


def first_row(tensor: torch.Tensor) -> int:
    """Return where this rank's rows begin in the whole tensor.

    Args:
        tensor: sharded over the last dimension of its mesh, or whole.
    """
    if not isinstance(tensor, DTensor):
        return 0
    mesh = tensor.device_mesh
    return row_range(tensor.shape[0], mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1))[0]


def first_element(tensor: torch.Tensor) -> int:
    """Return where this rank's rows begin in the whole tensor, flattened."""
    return first_row(tensor) * tensor.shape[1:].numel()


# ---------------------------------------------------------------------------------------------- storage


class Storage:
    """Makes arrays in every tier, and what moves them.

    Args:
        device: that computes.
        folder: on the disk for arrays on disk.

    Attributes:
        remainders: the lower halves of split master weights that loading has found, until the optimizer takes them.
        rows: of weights that several ranks share, what loading has read for this one, until they are sharded.
    """

    def __init__(self, device: torch.device, folder: Path) -> None:
        self.device = device
        self.remainders: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.rows: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._folder = folder
        self._file: DiskFile | None = None

    @property
    def disk_bytes(self) -> int:
        """The size of all arrays on disk."""
        return 0 if self._file is None else self._file.num_bytes

    def zeros(self, tier: str, numel: int, dtype: torch.dtype) -> Array:
        """Make a flat array of zeros.

        Args:
            tier: `device`, `paged` (on the device, but moved to the host and back as CUDA sees fit), `host` or `disk`.
            numel: its number of elements.
            dtype: of an element.

        Raises:
            DiskError: the disk has less room.
        """
        if tier == "paged" and self.device.type == "cuda":
            return _paged_memory(numel, dtype, self.device)
        if tier == "disk":
            self._file = self._file or self.open_file()
            return self._file.allocate(numel, dtype)
        if tier in ("device", "paged"):
            return torch.zeros(numel, dtype=dtype, device=self.device)
        num_bytes = numel * dtype.itemsize
        tensor = self.host_memory(num_bytes).view(dtype)
        _HOST_STORAGES[tensor.untyped_storage()] = True
        return tensor

    def buffer(self, num_bytes: int) -> torch.Tensor:
        """Allocate uninitialised host memory for data on its way: [num_bytes] uint8, from the start of a page."""
        return aligned_bytes(num_bytes, self.device)

    def workers(self) -> Workers:
        """Make threads that move data."""
        return Workers(self.device)

    def open_file(self) -> DiskFile:
        """Make the file for arrays on disk."""
        return DiskFile(self._folder)

    def host_memory(self, num_bytes: int) -> torch.Tensor:
        """Allocate zeroed host memory, locked for accelerators: [num_bytes] uint8."""
        if self.device.type == "cuda":
            return locked_zeros(num_bytes)
        return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=self.device.type != "cpu")


def _paged_memory(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    try:
        from bitsandbytes.functional import get_paged
    except ImportError as error:
        raise OptionsError("--optim paged_adamw_8bit needs bitsandbytes: pip install bitsandbytes") from error
    managed: torch.Tensor = get_paged(numel * dtype.itemsize, dtype=torch.uint8, device=device)
    # torch takes it for the CPU's, and the mark that bitsandbytes makes is lost in views: both refuse it on the device.
    memory = torch.as_tensor(_OnDevice(managed), device=device)
    return memory.view(dtype).zero_()


class _OnDevice:
    """Bytes that the device may use where they are, in the words of CUDA's array interface."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory  # kept as long as there are views of it
        data = (memory.data_ptr(), False)
        self.__cuda_array_interface__ = {"shape": (memory.numel(),), "typestr": "|u1", "data": data, "version": 3}


def host_pieces(array: Array) -> Iterator[torch.Tensor]:
    """Yield an array's content piece by piece, on the CPU: a tensor as a whole, what is on disk in chunks.

    Args:
        array: any shape.
    """
    if isinstance(array, torch.Tensor):
        yield array.detach().cpu()
        return
    buffer = aligned_bytes(paged(min(CHUNK, array.numel()) * array.element_size()), torch.device("cpu"))
    for start in range(0, array.numel(), CHUNK):
        count = min(CHUNK, array.numel() - start)
        array.read(start, count, buffer)
        yield buffer[: count * array.element_size()].view(array.dtype)


def fill(array: Array, values: torch.Tensor, first: int = 0) -> None:
    """Set an array's content, or a stretch of it.

    Args:
        array: any shape.
        values: on the CPU, of the same dtype.
        first: the element to begin with; on disk at a page boundary, and a stretch ends at one or with the array.
    """
    values = values.reshape(-1)
    if isinstance(array, torch.Tensor):
        array.detach().view(-1)[first : first + values.numel()].copy_(values)
        return
    if values.numel() == 0:
        return
    buffer = aligned_bytes(paged(min(CHUNK, values.numel()) * array.element_size()), torch.device("cpu"))
    for start, piece in zip(range(0, values.numel(), CHUNK), values.split(CHUNK), strict=True):
        buffer[: piece.numel() * array.element_size()].view(array.dtype).copy_(piece)
        array.write(first + start, piece.numel(), buffer)
