"""What there is, is shared by the ranks that share it; the slowest link sets the pace."""

from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from models import make_config

from fullft.config.config import Config
from fullft.config.ranks import Place
from fullft.memory import machine
from fullft.memory.machine import Device, find_device, least_of, margin_bytes

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


def test_margin_has_a_fixed_part_and_a_share() -> None:
    """64 MiB of workspaces, and 2% of the peak."""
    assert margin_bytes(0) == 64 * 2**20
    assert margin_bytes(50 * 2**30) - margin_bytes(0) == 2**30
