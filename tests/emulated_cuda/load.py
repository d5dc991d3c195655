"""Loads the emulated device into this process. Torch must not have been imported yet."""

import sys

from emulated_cuda.library import is_loaded, load_library


def load() -> None:
    """Load the device, once, and complete what a CPU build of torch lacks.

    Raises:
        RuntimeError: torch was imported before, or the device cannot be built.
    """
    if is_loaded():
        return
    load_library()
    from emulated_cuda import threads, torch_cuda, watch

    torch_cuda.complete()
    sys.setswitchinterval(threads.SWITCH_SECONDS)
    threads.follow_threads()
    watch.stand_in_for_bitsandbytes()
    watch.watch_files()
