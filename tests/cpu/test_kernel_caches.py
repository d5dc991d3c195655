"""What a run sets for its libraries before it imports them."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from fullft.config.parse import parse_config
from fullft.cpu.kernel_caches import KERNEL_CACHES, prepare_environment


def test_the_users_own_word_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"HF_HUB_OFFLINE": "1", "LRU_CACHE_CAPACITY": "2000"}
    monkeypatch.setattr(os, "environ", mine.copy())
    prepare_environment(parse_config([]))
    assert os.environ == KERNEL_CACHES | mine


def _compiles_kernels() -> bool:
    """Tell whether it is x86's bf16 products, for each of whose shapes there are kernels."""
    is_x86_linux = sys.platform == "linux" and platform.machine() == "x86_64"
    return is_x86_linux and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.skipif(not _compiles_kernels(), reason="of x86's bf16 products")
def test_kernels_of_ever_new_shapes_pile_up_unless_both_caches_are_limited() -> None:
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

    as_they_come = growth({})
    assert 2 * growth(KERNEL_CACHES) < as_they_come
    for name, shapes in KERNEL_CACHES.items():
        assert 2 * growth({name: shapes}) > as_they_come
