"""The device's functions, called through ctypes; see `device/interface.cpp`. Nothing here imports torch."""

import ctypes
import os
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from emulated_cuda.build import build, torch_folder

_ROOT = Path(__file__).parents[2]
_OURS = str(Path(__file__).parent)
_SHOWN_FRAMES = 3

# What the device has reported since `reset`: a text with the lines of the program, and how often.
races: "Counter[str]" = Counter()
waits: "Counter[Wait]" = Counter()

_device: Any = None
_listener: Any = None  # ctypes keeps no reference


class Wait(str):
    """A wait for the device: what for, and the program's lines, the innermost first.

    Attributes:
        thread: the name of the thread that waited.
    """

    thread: str


def is_loaded() -> bool:
    """Return whether this process has the emulated device."""
    return _device is not None


def load_library() -> None:
    """Build the library if need be, and load it. It must come before torch, which asks once what devices there are.

    Raises:
        RuntimeError: torch is already there, or the library cannot be built.
    """
    global _device
    if "torch" in sys.modules:
        raise RuntimeError("the emulated device must be loaded before torch is imported")
    library, torch = build(), torch_folder()
    assert torch is not None
    ctypes.CDLL(str(torch / "lib" / "libtorch_global_deps.so"), mode=ctypes.RTLD_GLOBAL)
    _device = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    _declare()


def _declare() -> None:
    global _listener
    memory = [ctypes.c_void_p, ctypes.c_size_t]
    for name, result, arguments in (
        ("take_snapshot", ctypes.c_int64, []),
        ("join_snapshot", None, [ctypes.c_int64]),
        ("forget_snapshot", None, [ctypes.c_int64]),
        ("touch_on_host", None, [*memory, ctypes.c_int, ctypes.c_char_p]),
        ("touch_on_stream", None, [*memory, ctypes.c_int, ctypes.c_char_p]),
        ("launch", None, [ctypes.c_char_p]),
        ("watch", None, [ctypes.c_int]),
        ("pin", None, memory),
        ("unpin", None, [ctypes.c_void_p]),
        ("set_limit", None, [ctypes.c_size_t]),
        ("figure", ctypes.c_int64, [ctypes.c_char_p]),
        ("counts", ctypes.c_char_p, []),
    ):
        function = getattr(_device, f"emulated_{name}")
        function.restype, function.argtypes = result, arguments
    _listener = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p)(_hear)
    _device.emulated_set_listener(_listener)


def call(name: str, *arguments: Any) -> Any:
    """Call a function of the device.

    Args:
        name: without its prefix.
        arguments: numbers, addresses and bytes.
    """
    return getattr(_device, f"emulated_{name}")(*arguments)


# ---------------------------------------------------------------------------------------------- what it reports


def _hear(kind: bytes, text: bytes) -> None:
    import threading

    thread = threading.current_thread().name
    message = f"{text.decode()}, at {place(sys._getframe().f_back)} [{thread}]"
    if kind == b"race":
        races[message] += 1
        return
    wait = Wait(message)
    wait.thread = thread
    waits[wait] += 1


def place(frame: FrameType | None) -> str:
    """Return the lines of the program that led to a frame, as file:line, the innermost first.

    Args:
        frame: the innermost.
    """
    lines: list[str] = []
    while frame is not None and len(lines) < _SHOWN_FRAMES:
        file = frame.f_code.co_filename
        is_ours = file.startswith(_OURS) and not os.path.basename(file).startswith("test_")
        if file.startswith(str(_ROOT)) and not is_ours and not file.startswith(sys.prefix):
            lines.append(f"{os.path.relpath(file, _ROOT)}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(lines) or "no line of ours"


def reset() -> None:
    """Forget what was reported and counted, and begin the peaks anew."""
    races.clear()
    waits.clear()
    call("reset_counts")
    call("reset_peaks")


def figure(name: str) -> int:
    """Return a figure by its name in `device/interface.cpp`; memory is in bytes."""
    value = int(call("figure", name.encode()))
    assert value >= 0, name
    return value


def counts() -> dict[str, int]:
    """Return how often each kernel ran, each kind of copy was made, and each kind of wait took place."""
    lines = call("counts").decode().splitlines()
    return {name: int(number) for name, number in (line.split("\t") for line in lines)}


def describe(most: int = 25) -> str:
    """Return what was reported since `reset`, as lines.

    Args:
        most: of each kind.
    """
    lines = [
        f"{figure('kernels')} kernels, {figure('copies')} copies, {figure('waits')} waits, {figure('races')} races; "
        f"allocated {figure('allocated_peak')}, reserved {figure('reserved_peak')}, "
        f"pinned {figure('pinned_held_peak')} bytes at their peaks"
    ]
    for title, found in (("race", races), ("wait", waits)):
        lines += [f"{title} x{number}: {text}" for text, number in found.most_common(most)]  # type: ignore[attr-defined]
    return "\n".join(lines)
