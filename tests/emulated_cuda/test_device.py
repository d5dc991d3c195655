"""The emulated device itself: apart from the host, ordered by events, as large and as roughly rounded as a card."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from emulated_cuda import build, library
from emulated_cuda.torch_cuda import limited

MIB = 1 << 20
emulated = pytest.mark.emulated


def races() -> list[str]:
    """Take what was reported."""
    found = list(library.races)
    library.reset()
    return found


@emulated
def test_mixed_devices_raise() -> None:
    device = torch.ones(4, device="cuda")
    with pytest.raises(RuntimeError, match="cuda:0 and cpu"):
        device + torch.ones(4)
    assert (device + torch.tensor(1.0)).tolist() == [2.0] * 4  # a number may come from the host


@emulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_new_memory_is_nan(dtype: torch.dtype) -> None:
    assert torch.empty(100, dtype=dtype, device="cuda").isnan().all()
    assert torch.empty(100, dtype=dtype, pin_memory=True).isnan().all()
    assert not torch.zeros(100, dtype=dtype, device="cuda").isnan().any()


@emulated
@pytest.mark.parametrize("is_ordered", [True, False])
def test_streams_without_an_event_race(is_ordered: bool) -> None:
    stream, values = torch.Stream("cuda"), torch.zeros(5000, device="cuda")
    host = torch.empty(5000, pin_memory=True)
    if is_ordered:
        stream.wait_event(torch.accelerator.current_stream().record_event())
    with stream:
        host.copy_(values, non_blocking=True)
    stream.synchronize()
    assert bool(races()) is not is_ordered


@emulated
@pytest.mark.parametrize("is_awaited", [True, False])
def test_host_must_wait_for_a_copy(is_awaited: bool) -> None:
    host = torch.empty(5000, pin_memory=True)
    host.copy_(torch.zeros(5000, device="cuda"), non_blocking=True)
    if is_awaited:
        torch.accelerator.synchronize()
    host.add_(1)
    assert bool(races()) is not is_awaited
    torch.accelerator.synchronize()


@emulated
def test_parts_of_a_page_do_not_race() -> None:
    host, device = torch.zeros(64, pin_memory=True), torch.zeros(64, device="cuda")
    torch.accelerator.synchronize()
    for start, stream in ((0, torch.Stream("cuda")), (32, torch.Stream("cuda"))):
        with stream:
            host[start : start + 32].copy_(device[start : start + 32], non_blocking=True)
    assert races() == []
    torch.accelerator.synchronize()


@emulated
@pytest.mark.parametrize("is_awaited", [True, False])
def test_threads_are_ordered_by_results(is_awaited: bool) -> None:
    host = torch.zeros(5000, pin_memory=True)
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(host.fill_, 1.0)
        while not future.done():
            pass
        if is_awaited:
            future.result()
        host.add_(1)
        found = races()
    assert bool(found) is not is_awaited


@emulated
def test_memory_freed_under_a_copy_is_a_race() -> None:
    host, stream = torch.empty(5000, pin_memory=True), torch.Stream("cuda")
    for is_recorded in (False, True):
        values = torch.zeros(5000, device="cuda")
        stream.wait_event(torch.accelerator.current_stream().record_event())
        with stream:
            host.copy_(values, non_blocking=True)
        if is_recorded:
            values.record_stream(stream)
        del values
        torch.zeros(1, device="cuda")  # messages come with the next kernel
        assert bool(races()) is not is_recorded
    stream.synchronize()


@emulated
def test_wait_is_reported_with_its_line() -> None:
    torch.ones((), device="cuda").item()
    (wait,) = [wait for wait in library.waits if wait.startswith("item")]
    assert "tests/emulated_cuda/test_device.py:" in wait and wait.thread == "MainThread"


@emulated
def test_masks_wait_and_numbers_do_not() -> None:
    values = torch.arange(8.0, device="cuda")
    mask = values > 3
    library.reset()
    values[2:].mul_(3).sum()
    assert library.figure("waits") == 0
    values[mask]
    assert library.figure("waits") == 1


@emulated
@pytest.mark.parametrize(
    ("asked", "allocated", "reserved"),
    [(100, 512, 2 * MIB), (3 * MIB, 3 * MIB, 20 * MIB), (23 * MIB + 1, 24 * MIB, 24 * MIB)],
)
def test_blocks_are_rounded_as_on_a_card(asked: int, allocated: int, reserved: int) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    stream = torch.Stream("cuda")  # whose blocks come from segments of its own
    with stream:
        tensor = torch.empty(asked, dtype=torch.uint8, device="cuda")
    assert torch.cuda.memory_allocated() - before[0] == allocated
    assert torch.cuda.memory_reserved() - before[1] == reserved
    del tensor
    assert torch.cuda.memory_reserved() - before[1] == reserved
    torch.cuda.empty_cache()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


@emulated
def test_a_full_device_is_out_of_memory() -> None:
    with limited(library.figure("reserved") + 30 * MIB):
        kept = torch.empty(20 * MIB, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(20 * MIB, dtype=torch.uint8, device="cuda")
        del kept
        torch.empty(28 * MIB, dtype=torch.uint8, device="cuda")  # what is kept for reuse makes room


@emulated
def test_pinned_blocks_are_powers_of_two_and_kept() -> None:
    library.call("empty_host_cache")
    before = torch.cuda.host_memory_stats()
    tensor = torch.empty(5 * MIB, dtype=torch.uint8, pin_memory=True)
    assert tensor.is_pinned() and not torch.empty(1).is_pinned()
    now = torch.cuda.host_memory_stats()
    assert now["allocated_bytes.current"] - before["allocated_bytes.current"] == 8 * MIB
    del tensor
    kept = torch.cuda.host_memory_stats()
    assert kept["allocated_bytes.current"] == now["allocated_bytes.current"]
    assert kept["active_bytes.current"] == before["active_bytes.current"]


@emulated
def test_registered_memory_is_pinned_as_it_is() -> None:
    tensor = torch.empty(5 * MIB, dtype=torch.uint8)
    before = library.figure("registered")
    torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
    assert tensor[MIB:].is_pinned() and library.figure("registered") - before == tensor.nbytes
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
    assert not tensor.is_pinned()


def test_missing_compiler_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(build, "_version", lambda torch: (build.pinned_version(), None))
    assert build.why_not() == "The emulated device needs g++ to be built."


def test_another_torch_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_version", lambda torch: ("1.0", None))
    assert "1.0 is installed" in str(build.why_not())
    monkeypatch.setattr(build, "_version", lambda torch: (build.pinned_version(), "13.0"))
    assert "has CUDA of its own" in str(build.why_not())
