"""Time optimizer steps without a model: million parameters per second, side by side.

    python benchmarks/optimizer_step.py                       # two threads, 2^24 parameters
    python benchmarks/optimizer_step.py --device cuda

Each optimizer steps one flat tensor: fp32 weights, or the bf16 weights of split masters. They take turns, so that other
load on the machine slows all of them alike. The table has the bytes of state per parameter, and the median and the
slowest speed. Each of its rows is an entry of `ROWS`.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed, as for train.py
# ruff: noqa: E402
from fullft.config.placement import Placement
from fullft.optim.adamw import AdamW
from fullft.optim.adamw_8bit import BLOCK, adamw_8bit_
from fullft.storage.tiers import Storage

LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY = 1e-5, (0.9, 0.999), 1e-8, 0.01

Step = Callable[[], None]


def main() -> None:
    """Step all rows in turn, and print the table."""
    parser = argparse.ArgumentParser(description="Measure optimizer steps on one flat tensor.")
    parser.add_argument("--parameters", type=int, default=1 << 24, help="parameters of the tensor (default: 2^24)")
    parser.add_argument("--repeats", type=int, default=15, help="steps of each row (default: 15)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--device", default="cpu", help="device that steps (default: cpu)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    steps: dict[str, Step] = {}
    for name, (_, prepare) in ROWS.items():
        torch.manual_seed(0)
        weights = torch.randn(arguments.parameters, device=arguments.device)
        steps[name] = prepare(weights, torch.randn_like(weights) * 1e-3)
        for _ in range(2):  # the first steps compile and allocate
            steps[name]()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.repeats):
        for name, step in steps.items():
            seconds[name].append(_time(step, arguments.device))

    device = f"{arguments.threads} threads" if arguments.device == "cpu" else torch.cuda.get_device_name()
    print(f"{arguments.parameters:,} parameters, {device}, median of {arguments.repeats}\n")
    print(f"{'optimizer':<32}{'state B/param':>14}{'M param/s':>12}{'slowest':>10}")
    for name, (state_bytes, _) in ROWS.items():
        median, slowest = (
            arguments.parameters / t / 1e6 for t in (statistics.median(seconds[name]), max(seconds[name]))
        )
        print(f"{name:<32}{state_bytes:>14.2f}{median:>12.0f}{slowest:>10.0f}")


def _time(step: Step, device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


# ---------------------------------------------------------------------------------------------- the rows


def _torch_fused(weights: torch.Tensor, gradient: torch.Tensor) -> Step:
    parameter = torch.nn.Parameter(weights)
    parameter.grad = gradient
    optimizer = torch.optim.AdamW(
        [parameter], lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
    )
    return optimizer.step


def _bitsandbytes_8bit(weights: torch.Tensor, gradient: torch.Tensor) -> Step:
    import bitsandbytes

    parameter = torch.nn.Parameter(weights)
    parameter.grad = gradient
    optimizer = bitsandbytes.optim.AdamW8bit(
        [parameter], lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY
    )
    step: Step = optimizer.step
    return step


def _ours_8bit(weights: torch.Tensor, gradient: torch.Tensor) -> Step:
    count = len(weights)
    moments = [torch.zeros(count, dtype=torch.uint8, device=weights.device) for _ in range(2)]
    scales = [torch.zeros(-(-count // BLOCK), device=weights.device) for _ in range(2)]
    step = 0

    def take() -> None:
        nonlocal step
        step += 1
        adamw_8bit_(
            *(weights, gradient, *moments, *scales),
            lr=LEARNING_RATE,
            beta1=BETAS[0],
            beta2=BETAS[1],
            eps=EPS,
            weight_decay=WEIGHT_DECAY,
            step=step,
        )

    return take


def _ours(moments: torch.dtype, masters: str, tier: str = "device") -> Callable[[torch.Tensor, torch.Tensor], Step]:
    """Build the whole optimizer on bf16 weights and a bf16 gradient: it joins masters, updates and splits them."""

    def prepare(weights: torch.Tensor, gradient: torch.Tensor) -> Step:
        parameter = torch.nn.Parameter(weights.bfloat16())
        parameter.grad = gradient.bfloat16()
        optimizer = AdamW(
            [{"params": [parameter], "weight_decay": WEIGHT_DECAY}],
            lr=LEARNING_RATE,
            betas=BETAS,
            eps=EPS,
            moments=lambda _: moments,
            masters=masters,
            placement=Placement(optimizer=tier),
            storage=Storage(weights.device, ROOT),
        )
        return optimizer.step

    return prepare


# Name -> bytes of state per parameter, and a function that makes a step of weights [n] and a gradient [n], both fp32.
ROWS: dict[str, tuple[float, Callable[[torch.Tensor, torch.Tensor], Step]]] = {
    "torch AdamW, fused, fp32 states": (8, _torch_fused),
    "bitsandbytes AdamW8bit": (2 + 8 / BLOCK, _bitsandbytes_8bit),
    "fullft, 8-bit states": (2 + 8 / BLOCK, _ours_8bit),
    "fullft, split, fp32 moments": (10, _ours(torch.float32, "split")),
    "fullft, split, 8-bit moments": (4 + 8 / BLOCK, _ours(torch.uint8, "split")),
    "fullft, stochastic, fp32 moments": (8, _ours(torch.float32, "stochastic")),
    "fullft, split, on disk": (10, _ours(torch.float32, "split", "disk")),
    "fullft, split, 8-bit, on disk": (4 + 8 / BLOCK, _ours(torch.uint8, "split", "disk")),
}


if __name__ == "__main__":
    main()
