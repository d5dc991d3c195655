"""Figures of the process and the host are its own, and what is available is less than there is."""

import os
import subprocess
import sys

import pytest
import torch

from fullft import hardware
from fullft.config.ranks import Place
from fullft.errors import OptionsError
from fullft.hardware import available_host_bytes


def test_available_memory_is_less_than_the_total() -> None:
    assert 0 < available_host_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def pretended_cuda(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A CUDA device's figures."""
    for name, value in {
        "max_memory_allocated": 70,
        "max_memory_reserved": 100,
        "memory_reserved": 90,
        "mem_get_info": (800, 1000),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: {"allocated_bytes.peak": 64}, raising=False)
    return torch.device("cuda")


def test_process_figures_are_those_of_the_allocator(
    pretended_cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = hardware.process_figures(pretended_cuda)
    assert figures.pop("resident_peak_bytes") > 0
    expected = {
        "allocated_peak_bytes": 70,
        "reserved_peak_bytes": 100,
        "unused_reserved_bytes": 30,
        "outside_bytes": 110,
    }
    assert figures == expected | {"pinned_host_peak_bytes": 64}
    assert set(hardware.process_figures(torch.device("cpu"))) == {"resident_peak_bytes"}
    monkeypatch.setattr(torch.cuda, "host_memory_stats", dict)  # before anything is pinned
    assert "pinned_host_peak_bytes" not in hardware.process_figures(pretended_cuda)
    monkeypatch.delattr(torch.cuda, "host_memory_stats")  # an older torch
    assert "pinned_host_peak_bytes" not in hardware.process_figures(pretended_cuda)


@pytest.mark.parametrize(
    ("available", "local_rank", "task", "index"),
    [(4, 0, None, 0), (4, 3, None, 3), (1, 3, 3, 0), (4, 3, 3, 3)],
)
def test_each_rank_gets_a_gpu(
    available: int, local_rank: int, task: int | None, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = pretend_gpus(available, task, monkeypatch)
    place = Place(rank=local_rank, count=4, local_rank=local_rank, local_count=4)
    assert hardware.pick_device(place) == torch.device("cuda", index) and chosen == [index]


@pytest.mark.parametrize(("available", "task"), [(2, None), (1, None), (2, 3), (1, 0)])
def test_too_few_gpus_are_refused(available: int, task: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last case is torchrun within one of Slurm's tasks."""
    chosen = pretend_gpus(available, task, monkeypatch)
    with pytest.raises(OptionsError, match=f"4 ranks were started on this machine, which has {available} GPU"):
        hardware.pick_device(Place(rank=3, count=4, local_rank=3, local_count=4))
    assert chosen == []


def test_one_rank_chooses_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pretend_gpus(4, None, monkeypatch) == []
    assert hardware.pick_device() == torch.device("cuda")


def test_ranks_without_gpus_compute_on_cpus() -> None:
    assert hardware.pick_device(Place(rank=3, count=4, local_rank=3, local_count=4)) == torch.device("cpu")


def pretend_gpus(count: int, task: int | None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pretend that there are GPUs, and a task of Slurm; return the list of GPUs that become the current one."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.delenv("SLURM_LOCALID", raising=False)
    if task is not None:
        monkeypatch.setenv("SLURM_LOCALID", str(task))
    return chosen


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux, where a process inherits its parent's peak")
def test_resident_peak_is_that_of_the_process() -> None:
    source = """
import resource
import torch
from fullft.hardware import peak_bytes

print(peak_bytes(torch.device("cpu")), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    ballast = b"1" * 2**30
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    own, inherited = map(int, done.stdout.split())
    assert own < len(ballast) < inherited
