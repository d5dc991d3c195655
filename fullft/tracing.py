"""Tracing: taking a step on fake tensors, which have shapes and dtypes but no bytes. This is how plans are made.

This is the one place that knows whether a step is traced. A fake operator takes some 60 microseconds whatever its size,
so a plan's time is its number of operators: what repeats without adding bytes is traced once. Each loop that repeats
says through `standing_for_all` how many of its rounds stand for all. Tests compare these stand-ins with the whole.

Fake tensors are on the CPU whatever device a plan is for, since most builds of torch know no other. Code whose memory
depends on the device asks `device_type`, which knows.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, overload

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

Part = TypeVar("Part")
_planned_for: ContextVar[str | None] = ContextVar("planned_for", default=None)  # the type of device; None: no tracing


class _FakeTensors(FakeTensorMode):
    """Fake tensors that experts of any dtype multiply: torch's own refuse all but bf16, where its kernels do not."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            with self:
                product = func(*(each.bfloat16() for each in args[:2]), *args[2:], **(kwargs or {}))
                return product.to(args[0].dtype)
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def tracing(device_type: str = "cpu") -> Iterator[None]:
    """Make every new tensor within the body a fake one.

    Args:
        device_type: what the fake tensors stand for: `cpu`, `cuda` or `mps`.
    """
    token = _planned_for.set(device_type)
    log = logging.getLogger(FakeTensorMode.__module__)
    was_disabled, log.disabled = log.disabled, True  # it prints a traceback of what the caller reports in a line
    try:
        # The tensors that are not fake are the code books of 8-bit moments.
        with _FakeTensors(allow_non_fake_inputs=True):
            yield
    finally:
        log.disabled = was_disabled
        _planned_for.reset(token)


def is_tracing() -> bool:
    """Return whether tensors have no values, so that nothing can be read from them."""
    return _planned_for.get() is not None


def device_type(device: torch.device) -> str:
    """Return the type of the device whose memory a step takes: a tensor's, or while tracing what the plan is for.

    Args:
        device: of the tensors at hand.
    """
    return _planned_for.get() or device.type


@overload
def standing_for_all(parts: range, count: int = 1) -> range: ...
@overload
def standing_for_all(parts: Sequence[Part], count: int = 1) -> Sequence[Part]: ...
def standing_for_all(parts: Sequence[Part], count: int = 1) -> Sequence[Part]:
    """Return all parts of a repetition; while tracing, only as many as stand for the rest.

    Args:
        parts: each takes no more memory than the first `count` did.
        count: how many are traced.
    """
    return parts[:count] if is_tracing() else parts


def is_fake(tensor: object) -> bool:
    """Return whether this tensor is fake, also outside of `tracing()`."""
    return isinstance(tensor, FakeTensor)
