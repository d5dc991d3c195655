"""Measure the limit of `mistral_7b.py`: matrix products, optimizer arithmetic and the disk of this machine."""

import mmap
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from queue import SimpleQueue

import torch
from mistral_7b_model import LEARNING_RATE, SIZES, WORK, outline, tokens_per_step
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from fullft.model.parts import decoder_layers
from fullft.optim.adamw import AdamW
from fullft.storage.tiers import Storage


@dataclass(frozen=True)
class Matrix:
    """A weight that multiplies every token.

    Attributes:
        shape: [out, in].
        forwards: forward products per micro-batch: one more where backward recomputes it.
    """

    shape: tuple[int, int]
    forwards: int


def matrices(model: PreTrainedModel) -> list[Matrix]:
    """List the matrices. Recomputation stops before a layer's last one, since backward never needs its output."""
    found = []
    for layer in decoder_layers(model):
        linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        found += [_matrix_of(each.weight, 1 if each is linears[-1] else 2) for each in linears]
    return [*found, _matrix_of(model.get_output_embeddings().weight, 1)]


def _matrix_of(weight: torch.Tensor, forwards: int) -> Matrix:
    rows, columns = weight.shape
    return Matrix((rows, columns), forwards)


def flops(shapes: list[Matrix], tokens: int) -> float:
    """Count the operations: per weight and token, 2 in forward, 4 in backward, 2 if recomputed."""
    return float(sum(2 * (matrix.forwards + 2) * matrix.shape[0] * matrix.shape[1] * tokens for matrix in shapes))


@dataclass(frozen=True)
class Rates:
    """The most that this machine can do.

    Attributes:
        products: per shape, seconds of the forward product and of both of backward.
        read: from the disk, bytes per second.
        write: to the disk.
        step: of the optimizer with everything in memory, parameters per second.
        norm: of gradients in memory, parameters per second.
    """

    products: dict[tuple[int, int], tuple[float, float]]
    read: float
    write: float
    step: float
    norm: float

    def best(self, other: "Rates") -> "Rates":
        """Return the better of two measurements, figure by figure."""
        products = {
            shape: (min(forward, other.products[shape][0]), min(backward, other.products[shape][1]))
            for shape, (forward, backward) in self.products.items()
        }
        names = ("read", "write", "step", "norm")
        return Rates(products, *(max(getattr(self, name), getattr(other, name)) for name in names))


def measure_apart(size: str) -> Rates:
    """Measure the rates in a process of its own, so that all its memory is free afterwards.

    Args:
        size: a key of `SIZES`.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure_rates, size).result()


def measure_rates(size: str) -> Rates:
    """Measure the rates of this machine as it is now, on the disk of `WORK`.

    Args:
        size: a key of `SIZES`.
    """
    model = outline(size)
    shapes = sorted({matrix.shape for matrix in matrices(model)})
    largest = max((matrix.shape for matrix in matrices(model)[:-1]), key=lambda shape: shape[0] * shape[1])
    products = {shape: measure_products(shape, tokens_per_step(size)) for shape in shapes}
    return Rates(products, *measure_disk(WORK, SIZES[size].probe), *measure_arithmetic(largest))


def seconds_of(work: Callable[[], object], times: int = 3) -> float:
    """Return the shortest time of some calls, after a first one that does not count."""
    work()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


@torch.no_grad()
def measure_products(shape: tuple[int, int], tokens: int) -> tuple[float, float]:
    """Time the matrix products of one weight: x W^T, and backward's dy W and dy^T x."""
    weight = torch.randn(shape).bfloat16()
    x, dy = torch.randn(tokens, shape[1]).bfloat16(), torch.randn(tokens, shape[0]).bfloat16()
    forward = seconds_of(lambda: linear(x, weight))
    return forward, seconds_of(lambda: dy @ weight) + seconds_of(lambda: dy.t() @ x)


def measure_disk(folder: Path, num_bytes: int) -> tuple[float, float]:
    """Time direct reading and writing, in requests of 16 MiB by 4 threads, on a file without a name.

    Returns:
        Bytes per second, read and written, each the best of four passes.
    """
    request, threads = 2**24, 4
    buffers: SimpleQueue[mmap.mmap] = SimpleQueue()
    for _ in range(threads):
        memory = mmap.mmap(-1, request)  # page-aligned
        memory.write(os.urandom(request))
        buffers.put(memory)
    with tempfile.NamedTemporaryFile(dir=folder) as named:
        file = os.open(named.name, os.O_RDWR | os.O_DIRECT)
        os.posix_fallocate(file, 0, num_bytes)

        def transfer(operation: Callable[..., int], offset: int) -> None:
            memory = buffers.get()
            assert operation(file, [memory], offset) == request
            buffers.put(memory)

        rates: dict[str, float] = {}
        # The first pass of writing does not count: it also allocates the space.
        for operation in (os.pwritev, *(os.preadv, os.pwritev) * 4):
            start = time.perf_counter()
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda offset, run=operation: transfer(run, offset), range(0, num_bytes, request)))
            rate = num_bytes / (time.perf_counter() - start)
            rates[operation.__name__] = max(rate, rates.get(operation.__name__, 0.0)) if rates else 0.0
        os.close(file)
    return rates["preadv"], rates["pwritev"]


def measure_arithmetic(shape: tuple[int, int]) -> tuple[float, float]:
    """Time the optimizer's step, and the norm, on one weight in memory.

    Returns:
        Parameters per second.
    """
    parameter = nn.Parameter(torch.randn(shape).bfloat16())
    optimizer = AdamW(
        [{"params": [parameter], "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.999),
        eps=1e-8,
        moments=lambda _: torch.uint8,
        masters="split",
        gradient_dtype=torch.bfloat16,
        storage=Storage(torch.device("cpu"), WORK),
    )
    parameter.grad = torch.randn(shape).bfloat16()
    (parameter * parameter).sum().backward()
    step, norm = seconds_of(optimizer.step), seconds_of(lambda: optimizer.clip_gradients(max_norm=0))
    return parameter.numel() / step, parameter.numel() / norm


def count_seconds(model: PreTrainedModel, rates: Rates) -> dict[str, dict[str, float]]:
    """Compute how long the arithmetic of each phase takes at the measured rates.

    Args:
        model: its shapes are read.
        rates: of this machine.

    Returns:
        Seconds of each kind of arithmetic, under the phases' names.
    """
    count = sum(parameter.numel() for parameter in model.parameters())
    products = [(matrix.forwards, *rates.products[matrix.shape]) for matrix in matrices(model)]
    return {
        "forward and backward": {
            "matrix products": sum(times * forward + backward for times, forward, backward in products)
        },
        "clipping": {"squares": count / rates.norm},
        "optimizer step": {"update": count / rates.step},
    }
