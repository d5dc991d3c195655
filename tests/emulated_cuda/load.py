"""Loads the emulated device into this process. Torch must not have been imported yet."""

import sys

from emulated_cuda.library import is_loaded, load_library

_kept: list[object] = []


def load() -> None:
    """Load the device, once, and complete what a CPU build of torch lacks.

    Raises:
        RuntimeError: torch was imported before, or the device cannot be built.
    """
    if is_loaded():
        return
    load_library()
    import flash_attention

    from emulated_cuda import threads, torch_cuda, watch

    torch_cuda.complete()
    _kept.append(flash_attention.register())  # kernels of the CPU are the device's
    sys.setswitchinterval(threads.SWITCH_SECONDS)
    threads.follow_threads()
    watch.stand_in_for_bitsandbytes()
    watch.watch_files()
