"""Worst steps of tiny models, tracked as a run's is."""

import torch
from models import VOCABULARY, optimizer_of, tiny_model
from transformers import PreTrainedConfig, PreTrainedModel

from fullft.attention.choice import attend_by_document
from fullft.config.config import Config
from fullft.data.micro_batch import MicroBatch
from fullft.memory.plan import Batch
from fullft.memory.profile import Profile
from fullft.memory.worst_step import take_worst_step
from fullft.model.loss import LossSum
from fullft.model.precision import autocast_of, dtype_of
from fullft.optim.adamw import AdamW
from fullft.transforms.activation_checkpointing import apply_activation_checkpointing


def deep(family: str, layers: int = 7) -> PreTrainedConfig:
    """Make a tiny config with more layers than the plan builds."""
    config = tiny_model(family, torch.float32, tied=family == "qwen2").config
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i % 2] for i in range(layers)]
    config.num_hidden_layers = layers
    return config


def micro_batch(config: Config, length: int, sequences: int = 1) -> MicroBatch:
    """Make random tokens; packed, two documents in each sequence, of lengths that attention rounds up."""
    ids = torch.randint(0, VOCABULARY, (sequences, length))
    inputs = {"input_ids": ids}
    if config.packing:
        documents = [torch.arange(length // 2 - 1), torch.arange(length - length // 2 + 1)]
        inputs["position_ids"] = torch.cat(documents).repeat(sequences, 1)
    return MicroBatch(inputs, ids.clone(), ids.numel(), sequences * (length - 1))


def model_of(family: str, config: Config, **options: object) -> PreTrainedModel:
    """Make a tiny model in the options' format, which attends and recomputes as in a run."""
    model = tiny_model(family, dtype_of(config.numerics.weights), **options)
    attend_by_document(model)
    apply_activation_checkpointing(model, config)
    return model


def worst_step(
    model: PreTrainedModel, config: Config, batch: Batch, count: int | None = None, optimizer: AdamW | None = None
) -> Profile:
    """Track the worst step with random micro-batches: `count` of them, or as many as a run takes."""
    count = min(2, config.gradient_accumulation_steps) if count is None else count
    held_out = micro_batch(config, batch.evaluation_length, batch.sequences) if batch.evaluation_length else None
    return take_worst_step(
        model,
        LossSum(model),
        optimizer or optimizer_of(model, config),
        [micro_batch(config, batch.length, batch.sequences) for _ in range(count)],
        held_out,
        autocast_of(config.numerics, torch.device("cpu"), keeps_copies=config.gpus == 1),
        config.max_grad_norm,
    )
