"""Short trajectories of training with a model of odd sizes, in any placement."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models import make_config, optimizer_of, summed_loss
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from fullft.config.config import Config
from fullft.optim.adamw import AdamW
from fullft.storage.tiers import Array, host_pieces

VOCABULARY = 1021  # odd, as other sizes below: no tensor is a whole number of chunks, pages or blocks
PLACEMENTS = [
    "optimizer=host",
    "optimizer=disk",
    "gradients=host",
    "gradients=disk",
    "optimizer=disk,gradients=disk",
    "optimizer=host,gradients=disk",
    "optimizer=disk,gradients=host",
    "optimizer=host,gradients=host",
]


def odd_model(tied: bool = False, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=43,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


@dataclass
class Trajectory:
    """What a run computed."""

    losses: list[float]
    norms: list[float]
    tensors: dict[str, torch.Tensor]

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Trajectory) and self.tensors.keys() == other.tensors.keys()
        return (self.losses, self.norms) == (other.losses, other.norms) and not self.differing(other)

    def differing(self, other: "Trajectory") -> list[str]:
        return [name for name, tensor in self.tensors.items() if not torch.equal(tensor, other.tensors[name])]


def content(array: Array) -> torch.Tensor:
    return torch.cat([piece.flatten().clone() for piece in host_pieces(array)])


def steps(model: PreTrainedModel, optimizer: AdamW, config: Config, first: int, last: int) -> Trajectory:
    """Take steps as train.py does. The learning rate and the batches depend on the step alone."""
    losses, norms = [], []
    for step in range(first, last + 1):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / step
        random = torch.Generator().manual_seed(step)
        for _ in range(config.gradient_accumulation_steps):
            ids = torch.randint(0, VOCABULARY, (2, 7), generator=random)
            loss = summed_loss(model, ids) / 12
            loss.backward()
            losses.append(loss.item())
        norms.append(optimizer.clip_gradients(config.max_grad_norm).item())
        optimizer.step()
        optimizer.zero_grad()
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        tensors |= {f"{name}.{key}": content(array) for key, array in optimizer.states_of(parameter).items()}
    return Trajectory(losses, norms, tensors)


def trajectory(folder: Path, tied: bool = False, last: int = 3, **options: Any) -> Trajectory:
    config = make_config(**{"output_dir": folder, "gradient_accumulation_steps": 1, "weight_decay": 0.1, **options})
    model = odd_model(tied, torch.float32 if config.precision == "fp32" else torch.bfloat16)
    return steps(model, optimizer_of(model, config), config, 1, last)
