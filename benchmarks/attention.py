"""Time attention within documents next to torch's fused kernel with a mask: forward and backward, on the CPU.

    python benchmarks/attention.py                          # SmolLM2-135M's heads in bf16, two threads
    python benchmarks/attention.py --heads 32 --key_heads 8 --width 128 --dtype float32

It compares one layer's attention, on packed sequences and on whole ones. The two take turns, so that other load on the
machine slows both alike. The table has the median time of each, and the median of the repeats' ratios.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed, as for train.py
# ruff: noqa: E402
from fullft.attention.documents import document_attention
from fullft.attention.interface import mask_of

# What a sequence holds: documents of their lengths.
CASES = {
    "7 documents": [300, 241, 190, 120, 90, 60, 23],
    "4 of one length": [256] * 4,
    "24 short ones": [41, 42, 43, 44] * 6,
    "one of 1,024": [1024],
    "one of 2,048": [2048],
    "one of 4,096": [4096],
}


def main() -> None:
    """Time both on each case, and print the table."""
    parser = argparse.ArgumentParser(description="Time attention within documents next to torch's with a mask.")
    parser.add_argument("--heads", type=int, default=9, help="heads of the queries (default: 9)")
    parser.add_argument("--key_heads", type=int, default=3, help="heads of keys and values (default: 3)")
    parser.add_argument("--width", type=int, default=64, help="width of a head (default: 64)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(default: bfloat16)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--repeats", type=int, default=21, help="repeats of each (default: 21)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| a sequence of | ours, ms | torch, ms | ratio |\n| --- | ---: | ---: | ---: |")
    for name, lengths in CASES.items():
        ours, theirs = measure(lengths, arguments)
        ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        print(f"| {name} | {statistics.median(ours):.1f} | {statistics.median(theirs):.1f} | {ratio:.2f} |", flush=True)


def measure(lengths: list[int], arguments: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Time forward and backward of both, in turn. torch's kernel gets no mask where it needs none.

    Args:
        lengths: tokens of each document of the sequence.
        arguments: the command line's.

    Returns:
        The milliseconds of ours and of torch's, repeat by repeat.
    """
    torch.manual_seed(0)
    tokens, scale = sum(lengths), arguments.width**-0.5
    positions = torch.cat([torch.arange(length) for length in lengths])[None]

    def vectors(heads: int) -> torch.Tensor:
        made = torch.randn(1, tokens, heads, arguments.width, dtype=getattr(torch, arguments.dtype))
        return made.transpose(1, 2).requires_grad_()

    query, key, value = vectors(arguments.heads), vectors(arguments.key_heads), vectors(arguments.key_heads)
    above = vectors(arguments.heads).detach()
    mask = mask_of(positions, query) if len(lengths) > 1 else None

    def ours() -> torch.Tensor:
        attended: torch.Tensor = document_attention(query, key, value, scale, positions)
        return attended

    def theirs() -> torch.Tensor:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )

    times: dict[Callable[[], torch.Tensor], list[float]] = {ours: [], theirs: []}
    for repeat in range(-2, arguments.repeats):  # the first two warm up
        for attend, own in times.items():
            start = time.perf_counter()
            attend().backward(above)
            if repeat >= 0:
                own.append(1e3 * (time.perf_counter() - start))
    return times[ours], times[theirs]


if __name__ == "__main__":
    main()
