"""What libraries read from the environment while they are imported, so that it must be there before.

Owns the variables that a run sets for itself, each of them unless the user has.
"""

import os

from fullft.config import Config
from fullft.hub import prepare_hub

# On a CPU oneDNN compiles kernels for each new shape of a bf16 product: a quarter of a MB, kept twice, by oneDNN and by
# what binds it to torch, for 1,024 shapes each. Documents go on bringing new ones, and a process grew by half a GiB.
# A micro-batch of 4,096 tokens in packed documents has 105 at most.
KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "256"}


def prepare_environment(config: Config) -> None:
    """Set what the run's libraries are to find.

    Args:
        config: as in `prepare_hub`.
    """
    prepare_hub(config)
    limit_kernel_caches()


def limit_kernel_caches() -> None:
    """Have kernels kept for the shapes of some micro-batches alone."""
    for name, shapes in KERNEL_CACHES.items():
        os.environ.setdefault(name, shapes)
