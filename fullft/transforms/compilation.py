"""Compilation: a decoder layer's forward and backward become graphs in which everything but its products is fused.

One graph serves all layers that are alike. It must be applied after activation checkpointing, so that graphs recompute,
and before layer streaming. Only training uses it: evaluation and generation would need graphs of their own, and the
worst step is tracked operator by operator.
"""

import functools
import importlib.util
import logging
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._inductor.exc import InductorError
from torch.fx.experimental import _config as shapes
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from tqdm import tqdm
from transformers import PreTrainedModel

from fullft.config.config import Config
from fullft.errors import OptionsError
from fullft.model.parts import decoder_layers

# It warns of in-place operators under selective checkpointing, of which a graph has none.
logging.getLogger("torch._higher_order_ops.wrap").addFilter(lambda record: "in-place ops" not in record.getMessage())

# A run of more operations should gain what it waits for the compiler, or more: some ten minutes of two cores without
# AMX, or of a large GPU.
WORTH_IT = {"cpu": 2e14, "cuda": 1e17}
# Measured on two cores (docs/benchmarks/speed.md); not yet on a GPU.
_COSTS = {"cpu": "takes 5 to 60 s longer for it, and others 3 to 27% less"}

Function = Callable[..., Any]
_FAILURES = (TorchDynamoException, InductorError, FailOnRecompileLimitHit)


def choose_compilation(config: Config, flops: float, device: torch.device) -> tuple[Config, str]:
    """Decide whether to compile where that was left at auto: long runs gain.

    Args:
        config: `compile` is read.
        flops: operations of the whole run, forward and backward.
        device: that computes.

    Returns:
        The options with `compile` decided, and a line for the user, which is empty where auto has chosen false.

    Raises:
        OptionsError: it was asked for, and there is no compiler.
    """
    lack = _lack(device)
    if config.compiles and lack:
        raise OptionsError(f"compile true needs {lack}: install it, or leave out --compile")
    if "compile" not in config.undecided:
        return config, ""
    gains = flops >= WORTH_IT.get(device.type, math.inf)
    chosen = replace(config, compile="true" if gains and not lack else "false")
    if not gains:
        return chosen, ""
    if lack:
        return chosen, f"Not compiled: {lack} was not found; install it, and so long a run should be shorter"
    costs = _COSTS.get(device.type, "takes longer for it, and others should take less")
    return chosen, f"Compiled: the decoder layers, since the run is long. The first step {costs}"


def _lack(device: torch.device) -> str:
    """Name what is missing to compile for a device. What the compiler itself needs shows when it runs.

    On a card that is only planned for nothing is: torch for CUDA brings its compiler.
    """
    compilers = (os.environ.get("CXX") or "g++", "clang++", "cl")
    if device.type == "cpu":
        return "" if any(map(shutil.which, compilers)) else "a C++ compiler such as g++"
    is_elsewhere = device.type == "cuda" and not torch.cuda.is_available()
    return "" if is_elsewhere or importlib.util.find_spec("triton") else "triton"


def apply_compilation(model: PreTrainedModel, config: Config) -> None:
    """Compile the decoder layers when they first compute with gradients; without `config.compiles`, do nothing.

    Losses and gradients are the same up to rounding: a graph adds the same numbers, but rounds less in between. A
    compiler that fails costs a warning, and the layers go on as they were.

    Args:
        model: changed in place.
        config: `compiles` is read.

    Raises:
        ModelError: the model's decoder layers cannot be found.
    """
    if not config.compiles:
        return
    attempt = _Attempt()
    for layer in decoder_layers(model):
        layer.forward = attempt.compiled(layer.forward)


def fuse(function: Function, device: torch.device, eager: Function | None = None) -> Function:
    """Return a function that does the same in as few kernels as a compiler can make of it.

    On a CPU, without a compiler, or if that fails, it is a function that needs none.

    Args:
        function: changes its arguments in place. They are tensors, whose first dimension may have any size, or None.
        device: of the tensors.
        eager: that needs no compiler; None for `function` itself.
    """
    eager = eager or function
    return eager if device.type == "cpu" or _lack(device) else fused(function, eager)


def fused(function: Function, eager: Function) -> Function:
    """Return what `fuse` returns where there is a compiler for the device.

    Args:
        function: as `fuse` takes it.
        eager: as `fuse` takes it.
    """
    graph = torch.compile(function, fullgraph=True, dynamic=True)
    has_failed = False

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        nonlocal has_failed
        if has_failed or is_in_torch_dispatch_mode():
            return eager(*args)
        try:
            return graph(*args)
        except _FAILURES as error:
            has_failed = True
            _warn_of(error, f"`{function.__name__}` takes several kernels")
            return eager(*args)

    return wrapped


class _Attempt:
    """Compiles all layers, or none if the first one fails.

    One graph serves rows of all lengths, and is as fast as one for a single length. Which graph computes a step must
    not depend on where the run was resumed. So shapes are dynamic from the first length on, not from the second, and
    equal sizes are not taken for one: a row that is as long as the model is wide gets no graph of its own.
    """

    def __init__(self) -> None:
        self._has_failed = self._has_succeeded = False

    def compiled(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        # One graph or none: a break within `torch.utils.checkpoint` leaves a half that is recomputed otherwise. With
        # `fallback_random` dropout draws what it draws without a compiler.
        graph = torch.compile(forward, fullgraph=True, dynamic=True, options={"fallback_random": True})
        is_left_out = False

        @functools.wraps(forward)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_left_out
            if self._has_failed or is_left_out or not torch.is_grad_enabled() or is_in_torch_dispatch_mode():
                return forward(*args, **kwargs)
            try:
                with shapes.patch(use_duck_shape=False):  # type: ignore[attr-defined]  # it is made at run time
                    outputs = graph(*args, **kwargs)
            except _FAILURES as error:
                # Layers that have run as graphs keep them: backward may recompute them in the same step.
                is_left_out, self._has_failed = True, not self._has_succeeded
                _warn_of(error, "training goes on without it")
                return forward(*args, **kwargs)
            self._has_succeeded = True
            return outputs

        return wrapped


def _warn_of(error: Exception, consequence: str) -> None:
    cause = str(error).strip().split("\n")[0][:200]
    tqdm.write(f"warning: the compiler failed ({cause}); {consequence}")
