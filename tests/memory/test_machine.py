"""What there is, is shared by the ranks that share it; the slowest link sets the pace."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from models import make_config
from ranks import run_on_ranks

from fullft.config.config import Config
from fullft.config.ranks import Place
from fullft.memory import machine
from fullft.memory.machine import ASSUMED, Device, find_device, least_of, measure_ring, measure_speeds

CPU = torch.device("cpu")


def placed(folder: Path, gpus: int, local_count: int) -> Config:
    config = make_config(gpus=gpus, shard="full", output_dir=folder)
    config.__dict__["place"] = Place(0, gpus, 0, local_count)
    return config


def test_ranks_share_memory_and_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is that of a machine; all machines write to the file system of `output_dir`."""
    monkeypatch.setattr(machine, "available_host_bytes", lambda: 1200)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: Mock(free=6000))
    alone, four, twice = (find_device(placed(tmp_path, *ranks), CPU) for ranks in ((1, 1), (4, 4), (8, 4)))
    assert (alone.memory_bytes, alone.disk_bytes, alone.name) == (1200, 6000, "this machine (CPU)")
    assert (four.memory_bytes, four.disk_bytes, four.name) == (300, 1500, "this machine (CPU), 1/4 of it")
    assert (twice.memory_bytes, twice.disk_bytes) == (300, 750)


def test_least_device_has_no_more_than_any() -> None:
    one, other = Device("one", 10, host_bytes=5, disk_bytes=7), Device("other", 20, host_bytes=4, disk_bytes=9)
    assert least_of([one, other]) == least_of([other, one]) == Device("one", 10, host_bytes=4, disk_bytes=7)


def test_ring_is_as_fast_as_its_slowest_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_disk_speeds", lambda *_: (1.0, 2.0))
    within, across = (measure_speeds(placed(tmp_path, 4, local), CPU, ring=12.0) for local in (4, 2))
    assert within.interconnect == 12 and (across.network, across.interconnect) == (6, machine._GLOO)
    assert not within.overlaps and (within.disk_read, within.disk_write) == (1, 2)
    planned = replace(placed(tmp_path, 4, 4), plan=True, device_memory="80GiB")
    assert measure_speeds(planned, CPU) == ASSUMED and ASSUMED.overlaps


def test_all_ranks_measure_the_same_ring(tmp_path: Path) -> None:
    rates = run_on_ranks(2, lambda: measure_ring(make_config(shard="full", output_dir=tmp_path), CPU))
    assert len(rates) == 2 and rates[0] == rates[1] > 0
