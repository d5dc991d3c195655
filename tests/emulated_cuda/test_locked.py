"""Locked memory on the emulated device: pinned as it is, watched for races, and counted."""

import gc

import pytest
import torch

from emulated_cuda import library
from fullft.hardware import process_figures
from fullft.storage import locked

pytestmark = pytest.mark.emulated

MIB = 1 << 20


def test_locked_memory_is_pinned_in_its_exact_size() -> None:
    gc.collect()  # what earlier tests have locked
    torch.empty(1, pin_memory=True)  # torch calls nothing pinned before it has begun to use the device
    before, torchs = library.figure("registered"), torch.cuda.host_memory_stats()["allocated_bytes.current"]
    memory = locked.locked_zeros(5 * MIB)
    assert memory.is_pinned() and memory[MIB:].view(torch.float32).is_pinned()
    assert library.figure("registered") - before == 5 * MIB  # where torch's own would take 8
    assert torch.cuda.host_memory_stats()["allocated_bytes.current"] == torchs
    assert process_figures(torch.device("cuda"))["pinned_host_peak_bytes"] >= 5 * MIB
    del memory
    gc.collect()
    assert library.figure("registered") == before


@pytest.mark.parametrize("is_awaited", [True, False])
def test_copies_from_locked_memory_can_race(is_awaited: bool) -> None:
    memory, stream = locked.locked_zeros(5000), torch.Stream("cuda")
    device = torch.zeros(5000, dtype=torch.uint8, device="cuda")
    stream.wait_event(torch.accelerator.current_stream().record_event())
    with stream:
        device.copy_(memory, non_blocking=True)
    if is_awaited:
        stream.synchronize()
    memory.fill_(1)
    torch.zeros(1, device="cuda")  # messages come with the next kernel
    found = list(library.races)
    library.reset()
    assert bool(found) is not is_awaited
    torch.accelerator.synchronize()


def test_memory_freed_under_a_copy_is_waited_for() -> None:
    memory, stream = locked.locked_zeros(5000), torch.Stream("cuda")
    device = torch.zeros(5000, dtype=torch.uint8, device="cuda")
    stream.wait_event(torch.accelerator.current_stream().record_event())
    with stream:
        device.copy_(memory, non_blocking=True)
    before = library.figure("waits")
    del memory
    assert library.figure("waits") > before and not library.races
