"""Models with random weights, built and trained as `train.py` does, on any device: for parts of `gpu.py`."""

# ruff: noqa: E402
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from fullft.attention.choice import choose_attention
from fullft.config.checks import find_problems
from fullft.config.config import Config, resolve
from fullft.config.options import Options
from fullft.data.micro_batch import Documents, GlobalBatch, MicroBatch
from fullft.model.bundled import bundled_config
from fullft.model.homes import move_layers_home
from fullft.model.loss import LossSum
from fullft.model.precision import autocast_of, dtype_of
from fullft.optim.adamw import AdamW
from fullft.optim.build import build_optimizer
from fullft.storage.tiers import Storage, fill, home_of, lives_elsewhere
from fullft.transforms.activation_checkpointing import apply_activation_checkpointing
from fullft.transforms.compilation import apply_compilation
from fullft.transforms.streaming import apply_layer_streaming

WORK = ROOT / "benchmarks" / "work" / "gpu"
DOCUMENT = 512  # tokens of a packed document
TOY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
TOY |= {"num_key_value_heads": 2, "vocab_size": 1024}


def small_config(is_emulated: bool) -> LlamaConfig:
    """Return SmolLM2-135M's config, or that of a toy."""
    return LlamaConfig(**(bundled_config("HuggingFaceTB/SmolLM2-135M") or {}) | (TOY if is_emulated else {}))


def shape_name(is_emulated: bool) -> str:
    """Return how the page calls that config."""
    return "a toy's shape" if is_emulated else "SmolLM2-135M's shape"


def config_of(**options: Any) -> Config:
    """Resolve options; what is not given leaves nothing to a plan."""
    given: dict[str, Any] = {
        "activation_checkpointing": "none",
        "offload": "none",
        "compile": "false",
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 1,
    }
    chosen = Options(model="given", output_dir=WORK / "run", **(given | options))
    problems = find_problems(chosen, {})
    assert not problems, problems
    return resolve(chosen)


def global_batch(config: Config, vocabulary: int, sequences: int, length: int) -> GlobalBatch:
    """Make the micro-batches of a step: random tokens, all of them targets; packed ones hold documents of `DOCUMENT`.

    Args:
        config: `gradient_accumulation_steps` and `packing` are read.
        vocabulary: number of tokens.
        sequences: of a micro-batch.
        length: of a sequence.
    """
    generator = torch.Generator().manual_seed(0)
    micro_batches = []
    document = min(DOCUMENT, length // 2)
    lengths = [min(document, length - start) for start in range(0, length, document)] * sequences
    for _ in range(config.gradient_accumulation_steps):
        ids = torch.randint(0, vocabulary, (sequences, length), generator=generator)
        inputs = {"input_ids": ids}
        if config.packing:
            inputs["position_ids"] = (torch.arange(length) % document).repeat(sequences, 1)
        documents = Documents.of(lengths) if config.packing else None
        num_targets = sequences * (length - 1)
        micro_batches.append(MicroBatch(inputs, ids.clone(), ids.numel(), num_targets, documents=documents))
    return GlobalBatch.of(micro_batches)


def random_model(config: Config, model_config: PreTrainedConfig, storage: Storage) -> PreTrainedModel:
    """Build a model with random weights where they are to live, at no time with all of them on the device.

    Args:
        config: number formats and placement are read.
        model_config: of a family without biases, whose vectors all begin as ones.
        storage: makes the homes of weights that do not live on the device.
    """
    streams = config.placement.streams_layers
    with torch.device("cpu" if streams else storage.device), no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(model_config, dtype=dtype_of(config.numerics.weights))
    model.tie_weights()
    if streams:
        move_layers_home(model, config.placement.parameters, storage, with_values=False)
    model.to(storage.device)
    model.requires_grad_(True).train()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.ones(parameter.shape, dtype=parameter.dtype, device=storage.device)
            if parameter.dim() > 1:
                values.normal_(std=0.02)
            if lives_elsewhere(parameter):
                fill(home_of(parameter), values.cpu())
            else:
                parameter.copy_(values)
    return model


@dataclass
class Training:
    """A model that can be trained, and its optimizer."""

    config: Config
    model: PreTrainedModel
    loss_sum: LossSum
    optimizer: AdamW

    @staticmethod
    def of(config: Config, model_config: PreTrainedConfig, device: torch.device) -> "Training":
        """Build both as `train.py` does."""
        config.output_dir.mkdir(parents=True, exist_ok=True)
        storage = Storage(device, config.output_dir)
        model = random_model(config, model_config, storage)
        apply_activation_checkpointing(model, config)
        apply_compilation(model, config)
        apply_layer_streaming(model, storage)
        choose_attention(model, config.joins_rows)
        return Training(config, model, LossSum(model), build_optimizer(model, config, storage))

    def take_step(self, batch: GlobalBatch) -> tuple[float, float]:
        """Take a step: parts 3 and 4 of `train.py`'s loop.

        Returns:
            The loss, and the seconds until the device was done.
        """
        device = self.model.device
        started = time.perf_counter()
        autocast = autocast_of(self.config.numerics, device, keeps_copies=True)
        loss = torch.zeros((), device=device)
        for micro_batch in batch:
            micro_batch = micro_batch.to(device)
            with autocast:
                micro_loss = self.loss_sum(micro_batch) / batch.num_target_tokens
            micro_loss.backward()
            loss += micro_loss.detach()
        self.optimizer.clip_gradients(max_norm=self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch.cuda.synchronize()
        return loss.item(), time.perf_counter() - started
