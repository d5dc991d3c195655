"""The figures of `lesson.py`: planned on fake tensors, tracked on real ones, or counted by torch."""

import functools
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed, as for train.py

# ruff: noqa: E402
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from fullft.attention.choice import attend_by_document
from fullft.config.config import Config, resolve
from fullft.config.options import Options
from fullft.data.micro_batch import MicroBatch
from fullft.memory.plan import Batch, num_layers, plan_step, shortened
from fullft.memory.worst_step import take_worst_step
from fullft.model.bundled import bundled_config
from fullft.model.loss import LossSum
from fullft.model.precision import autocast_of
from fullft.optim.build import build_optimizer
from fullft.storage.tiers import Storage
from fullft.tracing import tracing
from fullft.transforms.activation_checkpointing import apply_activation_checkpointing

LENGTH = 512  # tokens of the lesson's micro-batch

Figures = dict[str, Any]  # as in memory.json


def options(**changes: Any) -> Config:
    """Return the lesson's options: bf16 weights, AdamW, 16 micro-batches."""
    lesson: dict[str, Any] = {"precision": "bf16-true", "master_weights": "none", "optim": "adamw"}
    lesson |= {"activation_checkpointing": "none", "offload": "none"}
    return resolve(Options(model="given", **lesson | changes))


def model_config(name: str) -> PreTrainedConfig:
    """Return a bundled config."""
    found: PreTrainedConfig = AutoConfig.for_model(**(bundled_config(name) or {}))
    return found


@functools.cache
def plan(name: str, **changes: Any) -> Figures:
    """Plan the lesson's step of 1 x 512 tokens, with some options changed."""
    return plan_step(options(**changes), model_config(name), Batch(1, LENGTH))


def small_llama() -> LlamaConfig:
    """Describe a model that is small enough to run: 8 layers of width 256."""
    return LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=896,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=1,
    )


def track(mode: str) -> Figures:
    """Track the small Llama's step on real tensors.

    Args:
        mode: of activation checkpointing.
    """
    config = options(activation_checkpointing=mode)
    model = AutoModelForCausalLM.from_config(small_llama(), dtype=torch.bfloat16).train()
    attend_by_document(model)
    apply_activation_checkpointing(model, config)
    micro_batches = [MicroBatch.of(torch.randint(0, 2048, (1, LENGTH)))] * 2
    optimizer = build_optimizer(model, config, Storage(model.device, ROOT))
    autocast = autocast_of(config.numerics, model.device)
    return take_worst_step(model, LossSum(model), optimizer, micro_batches, None, autocast, 1.0).to_dict()


def loss_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the model's own loss. Ours takes gradients in forward, where torch's counter cannot follow."""
    loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def count_flops(shape: PreTrainedConfig, mode: str) -> int:
    """Count the floating-point operations of one forward and backward, on fake tensors."""
    with tracing(), no_init_weights(), FlopCounterMode(display=False) as counter:
        # Eager attention's matrix products are all counted. Those of torch's fused kernel are not, on CPUs.
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16, attn_implementation="eager").train()
        apply_activation_checkpointing(model, options(activation_checkpointing=mode))
        ids = torch.ones(1, LENGTH, dtype=torch.int64)
        loss_of(model, ids).backward()
    return int(counter.get_total_flops())


def extra_flops(shape: PreTrainedConfig) -> float:
    """Return the share of operations that `full` checkpointing adds, from models of 2 and 3 layers, which are alike."""

    def whole(mode: str) -> int:
        two, three = (count_flops(shortened(shape, layers), mode) for layers in (2, 3))
        return two + (num_layers(shape) - 2) * (three - two)

    return whole("full") / whole("none") - 1


def extra_flops_on_real_tensors() -> float:
    """Return the same share for the small Llama, run on real tensors with all its layers."""

    def count(mode: str) -> int:
        model = AutoModelForCausalLM.from_config(small_llama(), attn_implementation="eager").train()
        apply_activation_checkpointing(model, options(activation_checkpointing=mode))
        ids = torch.randint(0, 2048, (1, LENGTH))
        with FlopCounterMode(display=False) as counter:
            loss_of(model, ids).backward()
        return int(counter.get_total_flops())

    return count("full") / count("none") - 1


def moments_dtype(weights: torch.dtype) -> torch.dtype:
    """Return the dtype of the moments of torch's AdamW."""
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=weights))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()
    moment: torch.Tensor = optimizer.state[parameter]["exp_avg"]
    return moment.dtype
