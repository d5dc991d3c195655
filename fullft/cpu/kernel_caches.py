"""What libraries read from the environment while they are imported, so that it must be there before.

Owns when it is set, and the limits of kernel caches; what the hub's libraries read is `hub.py`'s.
"""

import os

from fullft.config.config import Config
from fullft.run.environment import prepare_hub

# On a CPU oneDNN compiles kernels for each new shape of a bf16 product. Its own cache and that of ideep, which binds it
# to torch, keep a quarter of a MB each per shape, for 1,024 shapes; documents bring ever new ones, and a process grew
# by half a GiB. A micro-batch of 4,096 tokens in packed documents has some 50, and 105 at most.
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
