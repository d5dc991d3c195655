"""Measurements of `listing.py` on the arithmetic: bytes, lost updates, sums in bf16, means of micro-batches.

Each function sets the listing's way next to ours, and returns lines of the table.
"""

import copy
import math
from collections.abc import Callable, Iterator

import bitsandbytes
import torch
from listing_rows import Cells, Lesson, Row, count_targets, loss_of
from smollm2_model import WORK
from transformers import PreTrainedModel

from fullft.config.parse import parse_config
from fullft.optim.build import build_optimizer
from fullft.storage.tiers import Storage

Build = Callable[[PreTrainedModel], torch.optim.Optimizer]


def bytes_per_parameter(lesson: Lesson) -> list[Cells]:
    """Measure the bytes of weights, gradients and optimizer states."""
    half, full = torch.bfloat16, torch.float32
    flags = ["--model", str(lesson.source), "--output_dir", str(WORK / "listing"), "--precision", "bf16-true"]
    flags += ["--master_weights", "none"]

    def ours(optim: str) -> Build:
        storage = Storage(torch.device("cpu"), WORK)
        return lambda model: build_optimizer(model, parse_config([*flags, "--optim", optim]), storage)

    def bnb(name: str) -> Build:
        return lambda model: getattr(bitsandbytes.optim, name)(model.parameters())

    return [
        (
            "12 bytes per parameter, for bf16 weights and fp32 moments: torch's AdamW, measured",
            _bytes(lesson, half, lambda model: torch.optim.AdamW(model.parameters())),
            f"{_bytes(lesson, half, ours('adamw'))} (bf16-true); {_bytes(lesson, full, ours('adamw'))} (bf16-mixed)",
        ),
        (
            "whose 12 bytes those are: bitsandbytes' 32-bit AdamW",
            _bytes(lesson, half, bnb("AdamW32bit")),
            "not offered",
        ),
        (
            "bitsandbytes' 8-bit AdamW (ours keeps the embeddings, 21% of this model, in 32 bits)",
            _bytes(lesson, half, bnb("AdamW8bit")),
            _bytes(lesson, half, ours("adamw_8bit")),
        ),
    ]


def _bytes(lesson: Lesson, dtype: torch.dtype, build: Build) -> str:
    """Take a step, and describe the bytes per parameter that are then kept."""
    model = copy.deepcopy(lesson.model).to(dtype)
    optimizer = build(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    count = sum(parameter.numel() for parameter in model.parameters())
    parts = [
        sum(parameter.nbytes for parameter in model.parameters()),
        sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None),
        # All states share the tables of the 8-bit code, so that each table counts once.
        sum(
            {
                value.data_ptr(): value.nbytes
                for state in optimizer.state.values()
                for value in state.values()
                if torch.is_tensor(value)
            }.values()
        ),
    ]
    dtypes = {
        str(state[name].dtype).removeprefix("torch.")
        for state in optimizer.state.values()
        for name in ("exp_avg", "state1")
        if name in state
    }
    return f"{sum(parts) / count:.2f} B, moments in {' and '.join(sorted(dtypes))}"


def rounded_away_updates(lesson: Lesson) -> list[Cells]:
    """Count the weights that have not moved at all after a few steps."""
    rows = sorted(lesson.our_sample(), key=lambda row: len(row["input_ids"]))[2:6]
    start = copy.deepcopy(lesson.model).to(torch.bfloat16)
    findings = []
    for rate in (2e-5, 1e-6):
        shares = []
        for dtype in (torch.bfloat16, torch.float32):
            model = copy.deepcopy(start).to(dtype)  # both start from the same values
            optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)
            for row in rows:
                (loss_of(model, row) / count_targets(row)).backward()
                optimizer.step()
                optimizer.zero_grad()
            pairs = zip(model.parameters(), start.parameters(), strict=True)
            same = sum(int((now == before.to(dtype)).sum()) for now, before in pairs)
            shares.append(same / sum(parameter.numel() for parameter in model.parameters()))
        findings.append(
            (
                f"bf16 weights round updates away: unchanged weights after {len(rows)} steps at {rate:g}",
                f"{shares[0]:.1%}",
                f"{shares[1]:.2%} (fp32 weights, as in bf16-mixed)",
            )
        )
    return findings


def bf16_sums(lesson: Lesson) -> list[Cells]:
    """Measure the error of summing one global batch's bf16 gradients."""
    model = copy.deepcopy(lesson.model).to(torch.bfloat16)
    rows = lesson.our_sample()
    total = sum(count_targets(row) for row in rows)
    sums: dict[torch.dtype, list[torch.Tensor]] = {
        dtype: [torch.zeros_like(parameter, dtype=dtype) for parameter in model.parameters()]
        for dtype in (torch.bfloat16, torch.float32, torch.float64)
    }
    for _, gradients in _gradients(model, rows):
        for own in sums.values():
            for accumulated, gradient in zip(own, gradients, strict=True):
                accumulated += (gradient / total).to(accumulated.dtype)
    exact = sums.pop(torch.float64)
    errors = {dtype: _relative_error(own, exact) for dtype, own in sums.items()}
    return [
        (
            f"gradients of {len(rows)} micro-batches are summed in bf16: relative error of the sum",
            f"{errors[torch.bfloat16]:.1e}",
            f"{errors[torch.float32]:.1e} (fp32 gradients, as in bf16-mixed)",
        )
    ]


def mean_of_means(lesson: Lesson) -> list[Cells]:
    """Measure how averaging the micro-batches' means changes loss and gradient."""
    rows = lesson.our_sample()
    counts = [count_targets(row) for row in rows]
    one = [torch.zeros_like(parameter) for parameter in lesson.model.parameters()]
    means = [torch.zeros_like(parameter) for parameter in lesson.model.parameters()]
    losses = []
    for count, (loss, gradients) in zip(counts, _gradients(lesson.model, rows), strict=True):
        losses.append(loss)
        for first, second, gradient in zip(one, means, gradients, strict=True):
            first.add_(gradient, alpha=1 / sum(counts))
            second.add_(gradient, alpha=1 / (count * len(rows)))
    loss = sum(losses) / sum(counts)
    mean = sum(total / count for total, count in zip(losses, counts, strict=True)) / len(rows)
    return [
        (
            f"accumulating micro-batch means ({len(rows)} rows, unpadded, {min(counts)} to {max(counts)} targets)",
            f"loss {mean:.3f} instead of {loss:.3f} ({mean / loss - 1:+.1%}); gradient off by "
            f"{_relative_error(means, one):.0%}, its norm by {_norm(means) / _norm(one) - 1:+.0%}",
            f"{loss:.3f}, one divisor for all",
        )
    ]


def _gradients(model: PreTrainedModel, rows: list[Row]) -> Iterator[tuple[float, list[torch.Tensor]]]:
    """Yield each row's summed loss and its gradients."""
    for row in rows:
        loss = loss_of(model, row)
        loss.backward()
        yield float(loss.detach()), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad(set_to_none=True)


def _norm(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def _relative_error(tensors: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return _norm([a.double() - b.double() for a, b in zip(tensors, exact, strict=True)]) / _norm(exact)
