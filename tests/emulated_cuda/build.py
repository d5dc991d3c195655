"""Builds the emulated device with g++, once for these sources and this torch; nothing here imports torch.

The device is tied to the internal headers of one version of torch, the one in `constraints.txt`.
"""

import fcntl
import hashlib
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "device"
_PINS = Path(__file__).parents[2] / "constraints.txt"
_BUILT = Path(sys.prefix) / "emulated_cuda"  # in the environment, which `make clean` removes
_KEPT = 4  # libraries, of as many versions of the sources
# The code runs as fast with -O1 as with -O2, and is compiled sooner.
_FLAGS = ["-std=c++20", "-O1", "-fPIC", "-DNDEBUG", "-Wno-interference-size"]


def why_not() -> str | None:
    """Return why the device cannot be built here, as a sentence; None where it can."""
    found = torch_folder()
    if found is None:
        return "torch is not installed."
    version, cuda = _version(found)
    if cuda is not None:
        return f"torch {version} has CUDA of its own: the emulated device needs a CPU build."
    if version.partition("+")[0] != (pinned := pinned_version()):
        return f"The emulated device is written for torch {pinned}, and {version} is installed."
    if shutil.which("g++") is None:
        return "The emulated device needs g++ to be built."
    return None


def pinned_version() -> str:
    """Return the version of torch that `constraints.txt` pins."""
    pinned = re.search(r"^torch==(\S+)", _PINS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert pinned is not None
    return pinned[1]


def torch_folder() -> Path | None:
    """Return where torch is installed."""
    spec = importlib.util.find_spec("torch")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def build() -> Path:
    """Return the device's library, built unless it already is. Of two processes at a time, one builds.

    Raises:
        RuntimeError: it cannot be built; with the compiler's words.
    """
    if (reason := why_not()) is not None:
        raise RuntimeError(reason)
    torch = torch_folder()
    assert torch is not None
    library = _BUILT / f"{_key(torch)}.so"
    _BUILT.mkdir(parents=True, exist_ok=True)
    with (_BUILT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(torch, library)
            for older in sorted(_BUILT.glob("*.so"), key=lambda file: file.stat().st_mtime)[:-_KEPT]:
                older.unlink()
    return library


def _version(torch: Path) -> tuple[str, str | None]:
    words = runpy.run_path(str(torch / "version.py"))
    return words["__version__"], words["cuda"] or words["hip"]


def _key(torch: Path) -> str:
    """Hash all that the library depends on."""
    content = hashlib.sha256(repr((_version(torch), _FLAGS, sys.version_info[:2])).encode())
    for file in sorted(SOURCES.iterdir()):
        content.update(file.name.encode() + file.read_bytes())
    return content.hexdigest()[:16]


def _compile(torch: Path, library: Path) -> None:
    """Compile the sources, two at a time or as many as there are cores, and link them under their name at the end."""
    include = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    with tempfile.TemporaryDirectory(dir=_BUILT) as folder:
        objects = {source: Path(folder, f"{source.stem}.o") for source in sorted(SOURCES.glob("*.cpp"))}
        commands = [["g++", *_FLAGS, "-c", str(file), "-o", str(to), *include] for file, to in objects.items()]
        _run_together(commands)
        linked = Path(folder, "linked.so")
        libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch / 'lib'}"]
        _run_together([["g++", "-shared", *map(str, objects.values()), "-o", str(linked), *libraries]])
        linked.rename(library)


def _run_together(commands: list[list[str]]) -> None:
    waiting, running = list(commands), []
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            running.append(subprocess.Popen(waiting.pop(), stderr=subprocess.PIPE, text=True))
        process = running.pop(0)
        _, errors = process.communicate()
        if process.returncode:
            for other in running:
                other.kill()
                other.communicate()
            raise RuntimeError(f"the emulated device does not compile:\n{errors}")


if __name__ == "__main__":
    print(build())
