"""What `gpu.py` runs on: the card, the host, the versions of what is installed."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch
from gpu_findings import GIB, Findings

from fullft.hardware import available_host_bytes

LIBRARIES = ("transformers", "accelerate", "trl", "bitsandbytes", "triton", "flash-attn")


def run(findings: Findings) -> None:
    """Note the facts, or that there is no card."""
    if not torch.cuda.is_available():
        findings.skip("torch finds no CUDA device: this command needs one, or --emulated")
        return
    properties = torch.cuda.get_device_properties(0)
    findings.add(
        "machine",
        {
            "card": torch.cuda.get_device_name(0),
            "cards": torch.cuda.device_count(),
            "memory": f"{properties.total_memory / GIB:.1f} GiB, {torch.cuda.mem_get_info(0)[0] / GIB:.1f} free",
            "compute capability": f"{properties.major}.{properties.minor}",
            "driver": _driver(),
            "host": f"{platform.machine()}, {os.cpu_count()} threads, {available_host_bytes() / GIB:.0f} GiB free",
            "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
            **{name: _version(name) for name in LIBRARIES},
            "python": platform.python_version(),
            "commit": _commit(),
        },
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _commit() -> str:
    asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
