"""Recycled memory holds what any other would; what is alive is never handed out again."""

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import tiny_model

from fullft.cpu import recycling
from fullft.data.micro_batch import MicroBatch
from fullft.model.loss import SummedCrossEntropy
from fullft.optim.gradients import Gradients
from fullft.storage.tiers import Storage

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _all_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recycling, "_LARGE", 1)
    monkeypatch.setattr(recycling, "_free", [])
    monkeypatch.setattr(recycling, "_glibc", lambda: None)  # its settings would outlast the tests here


def place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_memory_is_used_again_by_any_dtype_as_soon_as_nobody_has_it() -> None:
    first = recycling.empty((30, 10), torch.float32, CPU)
    assert place(first) % 64 == 0
    where, part = place(first), first[3:5].t()
    del first
    other = recycling.empty((600,), torch.bfloat16, CPU)
    assert place(other) != where  # `part` is still there
    del part
    again = recycling.empty((20, 30), torch.bfloat16, CPU)
    assert (place(again), again.shape, again.is_contiguous()) == (where, (20, 30), True)
    assert again.untyped_storage().nbytes() == 1200


def test_a_tensor_too_large_for_what_is_free_takes_its_place() -> None:
    small = recycling.empty((10,), torch.float64, CPU)
    del small
    large = recycling.empty((20,), torch.float64, CPU)
    assert recycling._free == []
    del large
    assert [memory.nbytes for memory in recycling._free] == [160]


def test_the_smallest_that_is_large_enough_is_taken() -> None:
    sizes = (400, 100, 200)
    tensors = [recycling.empty((size,), torch.uint8, CPU) for size in sizes]
    places = dict(zip(sizes, map(place, tensors), strict=True))
    del tensors
    assert place(recycling.empty((150,), torch.uint8, CPU)) == places[200]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("chunk", [5, 1024])
def test_gradients_in_recycled_memory_are_the_same_to_the_bit(
    family: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fullft.model.loss.CHUNK_TOKENS", chunk)

    def gradients() -> list[torch.Tensor]:
        model = tiny_model(family, torch.float32, tied=True)
        if recycling._LARGE == 1:
            recycling.apply_recycling(model)
        summed_cross_entropy = SummedCrossEntropy(model)
        losses = []
        for length in (24, 17, 30):
            micro_batch = MicroBatch.of(torch.arange(2 * length).view(2, length) * 7 % 1000)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                outputs = summed_cross_entropy.decoder(**micro_batch.inputs, use_cache=False)
                losses.append(summed_cross_entropy(outputs, micro_batch) / 7)
            if length > 20:  # else it waits for the next one: two losses are there at once
                torch.stack(losses).sum().backward()
                losses.clear()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    recycled = gradients()
    assert recycling._free  # and more than once
    monkeypatch.setattr(recycling, "_LARGE", 1 << 40)
    assert all(map(torch.equal, recycled, gradients()))


def test_sums_of_gradients_are_of_this_step_alone(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.zeros(300, 10, dtype=torch.bfloat16))
    sums = Gradients([weight], torch.float32, "device", Storage(CPU, tmp_path), use=lambda _: None)
    for _ in range(2):
        gradients = [torch.randn(300, 10, dtype=torch.bfloat16) for _ in range(3)]
        for gradient in gradients:
            (weight * gradient).sum().backward()
        total = sums.of(weight)
        assert isinstance(total, torch.Tensor)
        assert torch.equal(total.view(300, 10), torch.stack(gradients).float().cumsum(0)[-1])
        del total
        sums.clear()
        (memory,) = recycling._free  # of the sums, which the next step's take
        memory.fill(255)


@pytest.mark.parametrize("padding", [None, 3])
def test_the_gradient_of_embeddings_is_torchs(padding: int | None) -> None:
    fp32, theirs_fp32 = (gradient_of_embeddings(torch.float32, padding, recycles=each) for each in (True, False))
    assert torch.equal(fp32, theirs_fp32)
    assert bool((fp32[3] == 0).all()) == (padding == 3)
    # Rounded once in bf16, where torch rounds at every token.
    bf16, theirs = (gradient_of_embeddings(torch.bfloat16, padding, recycles=each) for each in (True, False))
    exact = gradient_of_embeddings(torch.float64, padding, recycles=False)
    assert (bf16 - exact).norm() < (theirs - exact).norm()


def gradient_of_embeddings(dtype: torch.dtype, padding: int | None, *, recycles: bool) -> torch.Tensor:
    embeddings = torch.nn.Embedding(20, 6, padding_idx=padding, dtype=dtype)
    if recycles:
        recycling.recycle_gradient(embeddings)
    found = embeddings(torch.randint(0, 8, (3, 50), generator=torch.Generator().manual_seed(0)))
    found.backward(torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype))
    assert embeddings.weight.grad is not None
    return embeddings.weight.grad


def _clears_page_by_page() -> bool:
    """Tell whether it is glibc that allocates, and the system that clears pages of 4 KiB."""
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return (
        platform.libc_ver()[0] == "glibc"
        and resource.getpagesize() == 4096
        and not (huge.is_file() and "[always]" in huge.read_text())
        and not {"LD_PRELOAD", *recycling._OWN_SETTINGS} & set(os.environ)
    )


@pytest.mark.skipif(not _clears_page_by_page(), reason="of glibc and small pages")
def test_what_is_freed_stays() -> None:
    source = """
import resource, sys
import torch
from fullft.cpu import recycling

if sys.argv[1] == "kept":
    heap = recycling._Heap(recycling._glibc())
    heap.before_micro_batch()
    heap.before_micro_batch()  # all but the first micro-batch's
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.ones(1 << 22) for _ in range(25)]
    del activations
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

    def pages_cleared(kept: str) -> int:
        done = subprocess.run([sys.executable, "-c", source, kept], capture_output=True, text=True, check=True)
        return int(done.stdout)

    kept = pages_cleared("kept")
    # Rarely something comes to lie on top of the heap, and it stays in any case.
    assert any(10 * kept < pages_cleared("as it comes") for _ in range(3))


@pytest.mark.skipif(not _clears_page_by_page(), reason="of glibc and small pages")
def test_gaps_in_what_stays_are_returned_once_the_process_has_grown_by_them() -> None:
    source = """
import torch
from fullft.cpu import recycling
from fullft.memory.proc import memory_field

model = torch.nn.Module()
model.device, model.get_input_embeddings = torch.device("cpu"), lambda embeddings=torch.nn.Embedding(1, 1): embeddings
recycling.apply_recycling(model)

def begin_micro_batch():
    before = memory_field("RssAnon")
    model.get_input_embeddings()(torch.tensor([0]))
    return round((before - memory_field("RssAnon")) / 2**20)

begin_micro_batch()
begin_micro_batch()
returned = [begin_micro_batch()]
tensors = [torch.ones(1 << 18) for _ in range(400)]  # 1 MiB each
kept = tensors[::2]
del tensors
returned += [begin_micro_batch(), begin_micro_batch()]
kept += [torch.ones(1 << 15) for _ in range(8)]  # a growth of less than an eighth
print(*returned, begin_micro_batch(), all(each.min() == 1 for each in kept))
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    *returned, is_intact = done.stdout.split()
    before, grown, after, later = map(int, returned)
    assert grown > 150
    assert max(before, after, later) < 20
    assert is_intact == "True"


@pytest.mark.skipif(not _clears_page_by_page(), reason="of glibc and small pages")
def test_nothing_large_of_the_first_micro_batch_stays() -> None:
    source = """
import torch
from fullft.cpu import recycling
from fullft.memory.proc import memory_field

heap = recycling._Heap(recycling._glibc())
for _ in range(2):
    with torch.no_grad():
        heap.before_micro_batch()  # of an evaluation: it does not count
    heap.before_micro_batch()
    before = memory_field("RssAnon")
    tensors = [torch.ones(1 << 22) for _ in range(10)]  # 16 MiB each
    del tensors
    print(round((memory_field("RssAnon") - before) / 2**20))
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    first, second = map(int, done.stdout.split())
    assert first < 20 < 100 < second  # from the second on they are kept, for the next ones to use
