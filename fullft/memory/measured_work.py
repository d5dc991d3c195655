"""The rates of a step's work on this machine: of forward and backward, of the optimizer, of the sums of gradients.

How fast a machine computes depends on the model: a large matrix product alone is no measure, since attention, norms and
activations take up to half of a step on a CPU. So two models of a few layers take a micro-batch each, and the line
through their times is continued to all layers, as the plan does with bytes.
"""

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from fullft.attention.choice import attend_by_document
from fullft.config.config import Config
from fullft.cpu.sums import add_
from fullft.data.micro_batch import MicroBatch
from fullft.memory.plan import Batch, layer_pattern, num_layers, shortened
from fullft.model.loss import LossSum
from fullft.model.parts import count_parameters, flops_per_token
from fullft.model.precision import autocast_of, dtype_of
from fullft.optim.build import build_optimizer
from fullft.storage.tiers import CHUNK, Storage
from fullft.storage.workers import THREADS

_MOST_TOKENS = 1024  # that a CPU is timed with
_MOST_PARAMETERS = 2**30  # of a model that is only there to be timed
_LONG = 2.0  # seconds: what takes so long is not timed twice


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return the shorter of two times, since the first run may have to start something; of long work the only one.

    Args:
        work: on the device.
        device: that is waited for.
    """
    times: list[float] = []
    while len(times) < 2 and sum(times) < _LONG:
        started = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def training_flops_per_second(
    config: Config, model_config: PreTrainedConfig, batch: Batch, device: torch.device
) -> float:
    """Return the operations per second of a model's forward and backward, eager and without recomputation.

    Args:
        config: number formats are read.
        model_config: of the model.
        batch: the largest micro-batches; a CPU is timed with some of their tokens.
        device: where training would run.

    Raises:
        MemoryError: a model of a few layers is too large to be only timed.
        torch.OutOfMemoryError: the device has no room for it.
    """
    length = min(batch.length, _MOST_TOKENS) if device.type == "cpu" else batch.length
    sequences = max(1, min(batch.sequences, _MOST_TOKENS // length)) if device.type == "cpu" else batch.sequences
    layers, (first, period) = num_layers(model_config), layer_pattern(model_config)
    few = first + period + (layers - first) % period
    more = min(layers, few + period * _periods_like_the_rest(model_config, few, period))
    # As many operations and seconds in all layers as the line through two models says.
    flops: list[float] = []
    seconds: list[float] = []
    for count in dict.fromkeys((few, more)):
        model = _model_of(config, shortened(model_config, count), device)
        flops.append(flops_per_token(model, length) * sequences * length)
        seconds.append(_seconds_of_micro_batch(config, model, sequences, length))
        del model
    times = (layers - few) / (more - few) if more > few else 0.0
    whole_flops, whole_seconds = (each[0] + times * (each[-1] - each[0]) for each in (flops, seconds))
    return whole_flops / max(whole_seconds, seconds[-1])


def _periods_like_the_rest(model_config: PreTrainedConfig, few: int, period: int) -> int:
    """Return how many periods of layers have as many parameters as the model without: fewer are lost in the noise."""
    with torch.device("meta"), no_init_weights():
        small, large = (
            count_parameters(AutoModelForCausalLM.from_config(shortened(model_config, count)).requires_grad_(True))
            for count in (few, few + period)
        )
    layers = max(1, large - small)
    if small + layers > _MOST_PARAMETERS:
        raise MemoryError(f"{small + layers:,} parameters")
    return max(1, min(math.ceil(small / layers), (_MOST_PARAMETERS - small) // layers))


def _model_of(config: Config, model_config: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    with torch.device(device), no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(model_config, dtype=dtype_of(config.numerics.weights))
    model.requires_grad_(True).train().tie_weights()
    attend_by_document(model)
    with torch.no_grad():
        for parameter in model.parameters():
            # A CPU's memory is there once it has been written to. A GPU draws less power for numbers that are alike.
            parameter.fill_(0.01) if device.type == "cpu" else parameter.normal_(std=0.02)
    return model


def _seconds_of_micro_batch(config: Config, model: PreTrainedModel, sequences: int, length: int) -> float:
    loss_sum, autocast = LossSum(model), autocast_of(config.numerics, model.device)

    def take(tokens: int) -> None:
        micro_batch = MicroBatch.of(torch.ones(sequences, tokens, dtype=torch.int64)).to(model.device)
        with autocast:
            loss = loss_sum(micro_batch)
        loss.backward()

    take(min(16, length))  # makes the gradients, and whatever is made once
    return seconds_of(lambda: take(length), model.device)


def updates_per_second(config: Config, device: torch.device) -> float:
    """Return how many parameters per second the optimizer clips and updates, with all of its arrays on the device.

    Args:
        config: its number formats and its optimizer are read.
        device: where training would run.
    """
    config = replace(config, offload="none")
    with torch.device(device):
        layer = nn.Linear(2048, 2 * CHUNK // 2048, bias=False, dtype=dtype_of(config.numerics.weights))
    optimizer = build_optimizer(layer, config, Storage(device, config.output_dir))

    def take_step() -> None:
        layer.weight.grad = torch.full_like(layer.weight, 0.01)
        optimizer.clip_gradients(max_norm=config.max_grad_norm)
        optimizer.step()

    try:
        take_step()  # makes the states
        return layer.weight.numel() / seconds_of(take_step, device)
    finally:
        optimizer.close()


def sums_per_second(config: Config) -> float:
    """Return how many elements per second the host adds to sums of gradients, with all its threads.

    Args:
        config: its number formats are read.
    """
    sums = torch.zeros(THREADS, CHUNK, dtype=dtype_of(config.numerics.gradients))
    gradients = torch.zeros(THREADS, CHUNK, dtype=dtype_of(config.numerics.weights))
    with ThreadPoolExecutor(THREADS, initializer=torch.set_num_threads, initargs=(1,)) as threads:
        return sums.numel() / seconds_of(lambda: list(threads.map(add_, sums, gradients)), torch.device("cpu"))
