"""Limits of the caches of matrix kernels on a CPU. They must be set before torch is imported.

oneDNN compiles kernels for each new shape of a bf16 product, 1 ms and 0.3 MB each. Two caches keep them for 1,024
shapes each: oneDNN's own, and that of ideep, which binds it to torch. Packed documents bring new shapes in every step,
so that a process grew by half a GiB. docs/internals/cpu.md has the measurements.
"""

import os

# A micro-batch of 4,096 tokens in packed documents has some 50 shapes, and 105 at most.
KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "256"}


def limit_kernel_caches() -> None:
    """Limit both caches, unless the environment sets a limit already."""
    for name, shapes in KERNEL_CACHES.items():
        os.environ.setdefault(name, shapes)
