"""Sums of large tensors on a CPU, taken piece by piece in its cache.

Rows and tiles belong to the numerics: of another length they would sum in another order.
"""

from collections.abc import Sequence

import torch

from fullft.tracing import device_type, standing_for_all

# Elements that are squared, or widened to be added, at a time: few enough for the cache.
TILE = 1 << 17
# One thread sums a row of squares. It must be shorter than 2^15, from where on torch shares one among threads, and the
# sum would depend on their number.
ROW = 1 << 14


def add_(total: torch.Tensor, values: torch.Tensor) -> None:
    """Add flat values of a narrower dtype in place; torch would first make a wide copy of all of them on a CPU.

    Args:
        total: [n].
        values: [n].
    """
    if device_type(total.device) != "cpu" or total.dtype == values.dtype:
        total.add_(values)
        return
    for start in standing_for_all(range(0, len(total), TILE)):
        total[start : start + TILE].add_(values[start : start + TILE])


def sum_in_order(scalars: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum any number of scalars, in an order that does not depend on the number of threads."""
    return torch.stack([row.sum() for row in torch.stack(list(scalars)).split(ROW)]).sum()


def sum_of_squares(values: torch.Tensor) -> torch.Tensor:
    """Sum squares in fp64 (fp32 on Apple's GPUs), in an order that does not depend on the number of threads.

    Args:
        values: [n], any floating dtype. torch sums a norm in fp32: over 10^6 elements it is off by 1e-5.
    """
    if (computing := device_type(values.device)) != "cpu":
        wide = torch.float32 if computing == "mps" else torch.float64
        norm: torch.Tensor = torch.linalg.vector_norm(values, dtype=wide)
        return norm.square_()
    # vector_norm would hold an fp64 copy of all values; a tile's copy stays in the cache.
    count = len(values) // ROW
    rows, rest = values[: count * ROW].view(count, ROW), values[count * ROW :]
    buffer = torch.empty(min(count, TILE // ROW), ROW, dtype=torch.float64)
    tiles = rows.split(TILE // ROW)
    norms = [torch.linalg.vector_norm(buffer[: len(tile)].copy_(tile), dim=1) for tile in tiles]
    norms.append(torch.linalg.vector_norm(rest.double(), keepdim=True))
    return torch.cat(norms).square_().sum()
