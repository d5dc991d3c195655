"""The plan: the worst step of a run on fake tensors, which have shapes and dtypes but no bytes.

It needs a config, no weights and no accelerator. A model of a few layers is built and tracked as a real one would be,
and the figures are extended to all layers. That is exact where layers repeat: at each moment of a step, named by its
phase and by the layer at work, live bytes are linear in the number of layers, and over the layers they are largest at
the first or the last ones.
"""

import copy
import gc
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from fullft.attention.choice import attend_by_document, attend_packed
from fullft.config.config import Config
from fullft.data.micro_batch import MicroBatch
from fullft.hardware import pick_device
from fullft.memory.collectives import Sent, sent_in_step
from fullft.memory.machine import margin_bytes
from fullft.memory.planned_autocast import autocast_as_cuda
from fullft.memory.planned_ranks import planned_ranks
from fullft.memory.planned_storage import PlannedStorage
from fullft.memory.profile import COMPONENTS, Profile
from fullft.memory.worst_step import take_worst_step
from fullft.model.homes import move_layers_home
from fullft.model.loss import LossSum
from fullft.model.parts import count_parameters, decoder_layers
from fullft.model.precision import autocast_of, dtype_of
from fullft.optim.build import build_optimizer
from fullft.tracing import tracing
from fullft.transforms.activation_checkpointing import apply_activation_checkpointing
from fullft.transforms.sharding import apply_sharding
from fullft.transforms.streaming import apply_layer_streaming

_structures: dict[str, list[tuple[Any, ...]]] = {}  # of a config's layers, which a plan asks for many times

# Part of the step, phase, whether the layer is counted from the end, and its number from there.
Slot = tuple[int, str, bool, int]


@dataclass(frozen=True)
class Batch:
    """The shape of the largest micro-batches.

    Attributes:
        sequences: rows.
        length: tokens of each.
        evaluation_length: tokens of each held-out one; 0 without evaluation.
        evaluation_sequences: held-out rows; 0 for as many as in training.
        tokens: of these rows, without padding; 0 if each has `length` tokens.
        evaluation_tokens: of these held-out rows, without padding; 0 if each has `evaluation_length` tokens.
        all_tokens: of all training rows of the run.
        all_evaluation_tokens: of all held-out rows of the run.
    """

    sequences: int
    length: int
    evaluation_length: int = 0
    evaluation_sequences: int = 0
    tokens: int = 0
    evaluation_tokens: int = 0
    all_tokens: int = sys.maxsize
    all_evaluation_tokens: int = sys.maxsize

    @staticmethod
    def of(micro_batches: list[MicroBatch], evaluation: MicroBatch | None) -> "Batch":
        """Return the shape of a run's largest micro-batches, each sequence of which is a row."""
        sequences, length = micro_batches[0].labels.shape
        batch = Batch(sequences, length, tokens=micro_batches[0].num_tokens)
        if evaluation is None:
            return batch
        held_out_sequences, held_out_length = evaluation.labels.shape
        held_out = {"evaluation_length": held_out_length, "evaluation_sequences": held_out_sequences}
        return replace(batch, **held_out, evaluation_tokens=evaluation.num_tokens)

    def under(self, config: Config) -> "Batch":
        """Return the micro-batches that these rows make where sequences share a row; else what this is.

        Args:
            config: `micro_batch_tokens` and `is_flat` are read.
        """
        if not config.is_flat:
            return self
        most, held_out_sequences = config.micro_batch_tokens, self.evaluation_sequences or self.sequences
        tokens = most or self.tokens or self.sequences * self.length
        held_out = self.evaluation_tokens or held_out_sequences * self.evaluation_length
        if most and held_out:
            held_out = max(most, self.evaluation_length)  # a longer row is one by itself
        return replace(
            self,
            sequences=1,
            length=min(tokens, self.all_tokens),
            evaluation_length=min(held_out, self.all_evaluation_tokens),
            evaluation_sequences=1,
        )


@dataclass(frozen=True)
class _Trace:
    """What a model of so many layers needs.

    Attributes:
        num_parameters: trainable ones.
        totals: per slot, the composition of its largest total.
        maxima: per slot, each component's own largest.
        host_bytes: kept in the host's memory.
        disk_bytes: kept on disk.
        sent: to other ranks, by each micro-batch that was tracked.
    """

    num_parameters: int
    totals: dict[Slot, dict[str, int]]
    maxima: dict[Slot, dict[str, int]]
    host_bytes: int
    disk_bytes: int
    sent: tuple[Sent, ...]


def plan_step(config: Config, model_config: PreTrainedConfig, batch: Batch) -> dict[str, Any]:
    """Predict the memory of a run's worst step.

    Args:
        config: number formats, recomputation, placement and packing are read.
        model_config: of a causal language model; its layers may be of several kinds, if these repeat.
        batch: the largest micro-batches.

    Returns:
        The figures of `memory.json`, in bytes, `num_parameters`, and `margin_bytes`: what an accelerator needs besides.
        For several ranks those of the first one, which has the most rows, and `sent`: by kind, what it sends to others
        in a step.
    """
    layers = num_layers(model_config)
    first, period = layer_pattern(model_config)
    period = math.lcm(period, config.recomputation.every or 1)
    # Sharded weights are fetched one layer ahead, and gradients leave one layer later: two layers at each end differ.
    ends = period * (2 if config.gpus > 1 else 1)
    few = first + 2 * ends + (layers - first) % period
    with _paused_garbage_collection():
        if few + period >= layers:
            return _figures(config, trace(config, model_config, batch, layers, first, ends))
        small = trace(config, model_config, batch, few, first, ends)
        large = trace(config, model_config, batch, few + period, first, ends)
    return _figures(config, _extend(small, large, (layers - few) // period))


def num_layers(model_config: PreTrainedConfig) -> int:
    """Return the number of decoder layers."""
    return int(model_config.get_text_config(decoder=True).num_hidden_layers)


def layer_pattern(model_config: PreTrainedConfig) -> tuple[int, int]:
    """Return how many first layers are of kinds of their own, and after how many layers the kinds of the rest repeat.

    Families with experts often begin with a few layers without.
    """
    kinds = _kinds_of_layers(model_config)
    layers = len(kinds)
    return min(
        (
            (first, period)
            for first in range(layers)
            for period in range(1, layers - first + 1)
            if all(kinds[i] == kinds[i - period] for i in range(first + period, layers))
        ),
        key=lambda pattern: pattern[0] + 2 * pattern[1],  # as many layers are traced
    )


def _kinds_of_layers(model_config: PreTrainedConfig) -> list[tuple[Any, ...]]:
    """Return what tells each layer from others: its place in the config's lists, and its modules and their shapes."""
    layers = num_layers(model_config)
    lists = list(zip(*_per_layer_lists(model_config, layers).values(), strict=True)) or [()] * layers
    key = model_config.to_json_string(use_diff=False)
    if key not in _structures:
        with torch.device("meta"), no_init_weights():
            stack = decoder_layers(AutoModelForCausalLM.from_config(model_config))
        _structures[key] = [
            (*map(type, layer.modules()), *(parameter.shape for parameter in layer.parameters())) for layer in stack
        ]
    return [(*values, *structure) for values, structure in zip(lists, _structures[key], strict=True)]


def _per_layer_lists(model_config: PreTrainedConfig, layers: int) -> dict[str, list[Any]]:
    values = model_config.get_text_config(decoder=True).to_dict()
    return {name: value for name, value in values.items() if isinstance(value, list) and len(value) == layers}


# ---------------------------------------------------------------------------------------------- tracing


def trace(config: Config, model_config: PreTrainedConfig, batch: Batch, layers: int, first: int, ends: int) -> _Trace:
    """Track the worst step of a model with so many layers, on fake tensors.

    Args:
        config: as in `plan_step`.
        model_config: of the whole model.
        batch: the largest micro-batches.
        layers: of the model to build.
        first: how many layers are of kinds of their own.
        ends: how many layers behind them, and at the end, have slots of their own as these do.
    """
    device, for_type = torch.device("cpu"), planned_device_type(config)
    with planned_ranks(config) as mesh, tracing(for_type), no_init_weights():
        model = AutoModelForCausalLM.from_config(
            shortened(model_config, layers), dtype=dtype_of(config.numerics.weights)
        )
        model.requires_grad_(True).train()  # as `load_model` leaves it
        model.tie_weights()  # left out together with the initial values
        _attend_as_on(for_type, model, config.joins_rows)
        if for_type == "cuda" and config.numerics.autocast:
            autocast_as_cuda(model)
        storage = PlannedStorage(device)
        if config.placement.streams_layers:
            move_layers_home(model, config.placement.parameters, storage, with_values=False)
        apply_activation_checkpointing(model, config)
        apply_layer_streaming(model, storage)
        apply_sharding(model, config, storage, mesh)
        optimizer = build_optimizer(model, config, storage)
        micro_batch = _micro_batch(batch.sequences, batch.length, config.joins_rows)
        held_out_sequences = batch.evaluation_sequences or batch.sequences
        held_out = batch.evaluation_length and _micro_batch(
            held_out_sequences, batch.evaluation_length, config.joins_rows
        )
        # Elsewhere the first one leaves whole weights, whole sums or sums of this copy behind.
        is_alike = config.gpus == 1 or (config.shard == "full" and config.group.copies == 1)
        profile = take_worst_step(
            model,
            LossSum(model, most_chunks=2),
            optimizer,
            [micro_batch] * (2 if config.accumulates and not is_alike else 1),
            held_out or None,
            autocast_of(config.numerics, device, keeps_copies=config.gpus == 1),
            config.max_grad_norm,
            # Of accumulated micro-batches the first needs least, since it finds no gradients: it is not worth the time.
            pretend_earlier=config.accumulates and is_alike,
        )
        return _by_slot(profile, count_parameters(model), layers, first + ends, ends)


def planned_device_type(config: Config) -> str:
    """Return the type of device that a plan is for: a card that `--plan` is told the memory of, or this machine's.

    Args:
        config: `plan` and `device_memory` are read.
    """
    return "cuda" if config.plan and config.device_memory is not None else pick_device().type


def _attend_as_on(device_type: str, model: PreTrainedModel, joins_rows: bool) -> None:
    """Make a model attend as a run on a device of this type chooses; on CUDA single documents keep torch's kernel."""
    if device_type == "cpu":
        attend_by_document(model)
    elif joins_rows:
        attend_packed(model, device_type)


def shortened(model_config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """Describe the same model with its first layers alone."""
    short = copy.deepcopy(model_config)
    text = short.get_text_config(decoder=True)
    for name, kinds in _per_layer_lists(model_config, num_layers(model_config)).items():
        setattr(text, name, kinds[:layers])
    text.num_hidden_layers = layers
    return short


def _micro_batch(sequences: int, length: int, joins_rows: bool) -> MicroBatch:
    ids = torch.ones(sequences, length, dtype=torch.int64)
    inputs = {"input_ids": ids}
    if joins_rows:
        inputs["position_ids"] = torch.ones_like(ids)
    return MicroBatch(inputs, torch.ones_like(ids), sequences * length, sequences * (length - 1))


@contextmanager
def _paused_garbage_collection() -> Iterator[None]:
    """Save a third of the time: each collection would visit all the objects that torch and transformers made."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _by_slot(profile: Profile, num_parameters: int, layers: int, begin: int, end: int) -> _Trace:
    totals: dict[Slot, dict[str, int]] = {}
    maxima: dict[Slot, dict[str, int]] = {}
    largest: dict[Slot, int] = {}
    for event, (moment, total) in enumerate(zip(profile.moments, profile.totals, strict=True)):
        from_end = moment.layer >= layers - end
        if not from_end and moment.layer >= begin:
            continue  # a layer in the middle needs at most what one at the ends needs
        slot = (moment.part, moment.phase, from_end, moment.layer - layers if from_end else moment.layer)
        live = {name: profile.curves[name][event] for name in COMPONENTS}
        if total > largest.get(slot, -1):
            largest[slot], totals[slot] = total, live
        known = maxima.setdefault(slot, live)
        maxima[slot] = {name: max(known[name], live[name]) for name in COMPONENTS}
    return _Trace(num_parameters, totals, maxima, profile.host_bytes, profile.disk_bytes, profile.sent)


# ---------------------------------------------------------------------------------------------- extending


def _extend(small: _Trace, large: _Trace, times: int) -> _Trace:
    """Continue the line through two models to the one with `times` more periods of layers than the small one."""

    def extended(few: dict[Slot, dict[str, int]], more: dict[Slot, dict[str, int]]) -> dict[Slot, dict[str, int]]:
        return {
            slot: {name: size + times * (more[slot][name] - size) for name, size in live.items()}
            for slot, live in few.items()
        }

    def continued(few: int, more: int) -> int:
        return few + times * (more - few)

    return _Trace(
        continued(small.num_parameters, large.num_parameters),
        extended(small.totals, large.totals),
        extended(small.maxima, large.maxima),
        continued(small.host_bytes, large.host_bytes),
        continued(small.disk_bytes, large.disk_bytes),
        tuple(few + (more + few * -1) * times for few, more in zip(small.sent, large.sent, strict=True)),
    )


def _figures(config: Config, whole: _Trace) -> dict[str, Any]:
    sums = {slot: sum(live.values()) for slot, live in whole.totals.items()}
    peak = max(sums, key=sums.__getitem__)
    phases: dict[str, int] = {}
    for slot, total in sums.items():
        phases[slot[1]] = max(total, phases.get(slot[1], 0))
    return {
        "num_parameters": whole.num_parameters,
        "peak_bytes": sums[peak],
        "peak_phase": peak[1],
        "margin_bytes": 0 if planned_device_type(config) == "cpu" else margin_bytes(sums[peak]),
        "components": {name: max(live[name] for live in whole.maxima.values()) for name in COMPONENTS},
        "at_peak": whole.totals[peak],
        "phases": phases,
        "host_bytes": whole.host_bytes,
        "disk_bytes": whole.disk_bytes,
    } | ({} if config.gpus == 1 else {"sent": asdict(sent_in_step(whole.sent, config.gradient_accumulation_steps))})
