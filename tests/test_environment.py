"""What a run sets for its libraries before it imports them."""

import os
import subprocess
import sys

import pytest
import torch

from fullft.environment import KERNEL_CACHES, limit_kernel_caches


def test_the_users_own_word_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = KERNEL_CACHES
    monkeypatch.setenv(one, "2000")
    monkeypatch.delenv(other, raising=False)
    limit_kernel_caches()
    assert (os.environ[one], os.environ[other]) == ("2000", KERNEL_CACHES[other])


@pytest.mark.skipif(
    sys.platform != "linux" or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="of processors for whose bf16 products kernels are compiled",
)
def test_kernels_of_ever_new_shapes_do_not_pile_up() -> None:
    source = """
import resource
import torch

vectors = torch.ones(1000, 64, dtype=torch.bfloat16)
torch.mm(vectors[:1], vectors.t())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for length in range(1, 1000):
    torch.mm(vectors[:length], vectors[:64].t())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""

    def growth(settings: dict[str, str]) -> int:
        environment = {name: value for name, value in os.environ.items() if name not in KERNEL_CACHES} | settings
        done = subprocess.run(
            [sys.executable, "-c", source], env=environment, capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    as_it_comes = growth({})
    assert 2 * growth(KERNEL_CACHES) < as_it_comes
    one, _ = KERNEL_CACHES
    assert 2 * growth({one: KERNEL_CACHES[one]}) > as_it_comes  # the other cache alone keeps them all
