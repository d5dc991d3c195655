"""Reused memory holds what any other would, and memory in use is never handed out again."""

from types import SimpleNamespace

import pytest
import torch
from models import tiny_model

from fullft.cpu import reuse
from fullft.data.micro_batch import MicroBatch
from fullft.model.loss import LossSum

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _all_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reuse, "_LARGE", 1)
    monkeypatch.setattr(reuse, "_free", [])


def place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_freed_memory_is_reused_by_any_dtype() -> None:
    first = reuse.empty((30, 10), torch.float32, CPU)
    assert place(first) % 64 == 0
    where, part = place(first), first[3:5].t()
    del first
    other = reuse.empty((600,), torch.bfloat16, CPU)
    assert place(other) != where  # `part` is still there
    del part
    again = reuse.empty((20, 30), torch.bfloat16, CPU)
    assert (place(again), again.shape, again.is_contiguous()) == (where, (20, 30), True)
    assert again.untyped_storage().nbytes() == 1200


def test_larger_tensor_replaces_the_freed_memory() -> None:
    small = reuse.empty((10,), torch.float64, CPU)
    del small
    large = reuse.empty((20,), torch.float64, CPU)
    assert reuse._free == []
    del large
    assert [memory.nbytes for memory in reuse._free] == [160]


def test_smallest_sufficient_memory_is_taken() -> None:
    sizes = (400, 100, 200)
    tensors = [reuse.empty((size,), torch.uint8, CPU) for size in sizes]
    places = dict(zip(sizes, map(place, tensors), strict=True))
    del tensors
    assert place(reuse.empty((150,), torch.uint8, CPU)) == places[200]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("chunk", [5, 1024])
def test_gradients_in_reused_memory_are_bitwise_the_same(
    family: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fullft.model.loss.CHUNK_TOKENS", chunk)

    def gradients() -> list[torch.Tensor]:
        model = tiny_model(family, torch.float32, tied=True)
        if reuse._LARGE == 1:
            reuse.reuse_memory(model)
        loss_sum = LossSum(model)
        losses = []
        for length in (24, 17, 30):
            micro_batch = MicroBatch.of(torch.arange(2 * length).view(2, length) * 7 % 1000)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                losses.append(loss_sum(micro_batch) / 7)
            if length > 20:  # else two losses exist at once
                torch.stack(losses).sum().backward()
                losses.clear()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    found = gradients()
    assert reuse._free
    monkeypatch.setattr(reuse, "_LARGE", 1 << 40)
    assert all(map(torch.equal, found, gradients()))


@pytest.mark.parametrize("padding", [None, 3])
def test_gradient_of_embeddings_equals_that_of_torch(padding: int | None) -> None:
    fp32, theirs_fp32 = (gradient_of_embeddings(torch.float32, padding, reuses=each) for each in (True, False))
    assert torch.equal(fp32, theirs_fp32)
    assert bool((fp32[3] == 0).all()) == (padding == 3)
    # Rounded once in bf16, where torch rounds at every token.
    bf16, theirs = (gradient_of_embeddings(torch.bfloat16, padding, reuses=each) for each in (True, False))
    exact = gradient_of_embeddings(torch.float64, padding, reuses=False)
    assert (bf16 - exact).norm() < (theirs - exact).norm()


def gradient_of_embeddings(dtype: torch.dtype, padding: int | None, *, reuses: bool) -> torch.Tensor:
    embeddings = torch.nn.Embedding(20, 6, padding_idx=padding, dtype=dtype)
    if reuses:
        model = SimpleNamespace(device=CPU, get_input_embeddings=lambda: embeddings)
        reuse.reuse_memory(model)  # type: ignore[arg-type]
    found = embeddings(torch.randint(0, 8, (3, 50), generator=torch.Generator().manual_seed(0)))
    found.backward(torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype))
    assert embeddings.weight.grad is not None
    return embeddings.weight.grad
