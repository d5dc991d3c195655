"""Caches of matrix kernels are limited, unless the user has set their limits."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from fullft.cpu.kernel_caches import KERNEL_CACHES, limit_kernel_caches


def test_limits_in_the_environment_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"LRU_CACHE_CAPACITY": "2000"}
    monkeypatch.setattr(os, "environ", mine.copy())
    limit_kernel_caches()
    assert os.environ == KERNEL_CACHES | mine


def _compiles_kernels() -> bool:
    """Return whether bf16 products are those of x86, which compile kernels for each shape."""
    is_x86_linux = sys.platform == "linux" and platform.machine() == "x86_64"
    return is_x86_linux and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.skipif(not _compiles_kernels(), reason="of x86's bf16 products")
def test_kernels_pile_up_unless_both_caches_are_limited() -> None:
    source = """
from pathlib import Path

import torch

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

vectors = torch.ones(1000, 64, dtype=torch.bfloat16)
torch.mm(vectors[:1], vectors[:64].t())
before = peak()
for length in range(2, 1000):
    torch.mm(vectors[:length], vectors[:64].t())
print(peak() - before)
"""

    def growth(settings: dict[str, str]) -> int:
        environment = {name: value for name, value in os.environ.items() if name not in KERNEL_CACHES} | settings
        command = [sys.executable, "-c", source]
        return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    unlimited = growth({})
    assert 2 * growth(KERNEL_CACHES) < unlimited
    for name, shapes in KERNEL_CACHES.items():
        assert 2 * growth({name: shapes}) > unlimited
