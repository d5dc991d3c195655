"""Short runs over any number of ranks, as train.py takes them, and the same ones on one device."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from models import make_config
from ranks import run_on_ranks
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from fullft.config.config import Config
from fullft.cpu.reuse import reuse_memory
from fullft.data.micro_batch import GlobalBatch, MicroBatch
from fullft.model.loss import LossSum
from fullft.model.precision import autocast_of, dtype_of
from fullft.optim.build import build_optimizer
from fullft.ranks import sum_over_ranks
from fullft.storage.tiers import Storage
from fullft.transforms.activation_checkpointing import apply_activation_checkpointing
from fullft.transforms.compilation import apply_compilation
from fullft.transforms.sharding import apply_sharding

STAGES = ("none", "optimizer", "gradients", "full")
VOCABULARY = 101
CPU = torch.device("cpu")


def odd_model(family: str, dtype: torch.dtype) -> PreTrainedModel:
    """Make a model whose sizes no number of ranks divides; of its 5 rows, one of 4 ranks gets none.

    Args:
        family: `llama`; `tied`, the same with tied embeddings; `wide`, with moments in 8 bits; `gpt2`, with dropout.
        dtype: of its weights.
    """
    tokens = {
        "vocab_size": VOCABULARY,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": family in ("tied", "gpt2"),
    }
    if family == "gpt2":
        dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
        config = GPT2Config(n_embd=36, n_layer=3, n_head=4, n_positions=64, **tokens, **dropout)
    else:
        width, inner = (128, 192) if family == "wide" else (48, 5)
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        config = LlamaConfig(hidden_size=width, intermediate_size=inner, num_hidden_layers=3, **heads, **tokens)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.requires_grad_(True).train()


def uneven_batch(config: Config, step: int, count: int = 5) -> GlobalBatch:
    """Make a step's micro-batches, all of unlike length and targets, and deal them to the ranks."""
    random = torch.Generator().manual_seed(step)
    every = []
    for number in range(count):
        ids = torch.randint(1, VOCABULARY, (1, 6 + 5 * number), generator=random)
        labels = ids.clone()
        labels[:, : 2 + 3 * number] = -100
        every.append(MicroBatch.of(ids, labels))
    rank, ranks = config.place.rank, config.gpus
    end = -(-count // ranks) * ranks
    mine = {}
    for number in range(rank, end, ranks):
        each = every[number] if number < count else every[-1].without_targets()
        mine[number] = replace(each, is_last=number + ranks >= end)
    return replace(GlobalBatch.of(every, seed=1, step=step), micro_batches=mine)


@dataclass
class Course:
    """What a run computed, and its weights at the end, gathered."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def distance(self, other: "Course") -> float:
        """Return the largest difference of losses, norms and weights."""
        pairs = [*zip(self.losses, other.losses, strict=True), *zip(self.norms, other.norms, strict=True)]
        weights = [(tensor - other.weights[name]).abs().max().item() for name, tensor in self.weights.items()]
        return max([abs(one - another) for one, another in pairs] + weights)

    def has_same_weights(self, other: "Course") -> bool:
        return all(torch.equal(tensor, other.weights[name]) for name, tensor in self.weights.items())


class Run:
    """A model and its optimizer, built as train.py builds them."""

    def __init__(self, family: str, config: Config, dtype: torch.dtype | None = None) -> None:
        self.config = config
        self.model = odd_model(family, dtype or dtype_of(config.numerics.weights))
        self.storage = Storage(CPU, config.output_dir)
        apply_activation_checkpointing(self.model, config)
        apply_compilation(self.model, config)
        apply_sharding(self.model, config, self.storage)
        reuse_memory(self.model)
        self.loss_sum = LossSum(self.model)
        self.optimizer = build_optimizer(self.model, config, self.storage)

    def step(self, step: int, course: Course, count: int) -> None:
        batch, loss = uneven_batch(self.config, step, count), torch.zeros((), dtype=torch.float64)
        for micro_batch in batch:
            with autocast_of(self.config.numerics, CPU, keeps_copies=self.config.gpus == 1):
                micro_loss = self.loss_sum(micro_batch) / batch.num_target_tokens
            micro_loss.backward()
            loss += micro_loss.detach()
        norm = self.optimizer.clip_gradients(max_norm=self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        course.losses.append(sum_over_ranks(loss).item())
        course.norms.append(norm.item())

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: whole(parameter) for name, parameter in self.model.named_parameters()}


def whole(parameter: torch.Tensor) -> torch.Tensor:
    parameter = parameter.detach()
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).clone()


def take_steps(
    family: str,
    options: dict[str, Any],
    steps: int = 3,
    count: int = 5,
    dtype: torch.dtype | None = None,
    between: Callable[[Run], object] = lambda run: None,
) -> Course:
    """Take some steps; `between` is called after each of them.

    Args:
        family: as in `odd_model`.
        options: of the run.
        steps: how many.
        count: micro-batches of a step, over all ranks.
        dtype: of the weights, instead of what the options say.
        between: gets the run.
    """
    accumulation = -(-count // make_config(**options).gpus)
    options = {"gradient_accumulation_steps": accumulation, "learning_rate": 1e-2, "compile": "false", **options}
    config = make_config(**{"output_dir": Path("/tmp"), **options})
    run, course = Run(family, config, dtype), Course()
    for step in range(1, steps + 1):
        run.step(step, course, count)
        between(run)
    course.weights = run.weights()
    return course


def each_rank_takes(ranks: int, cases: list[tuple[Any, ...]], per_node: int | None = None) -> list[list[Course]]:
    """Take several runs on as many ranks; return each run's courses, by rank.

    Args:
        ranks: how many.
        cases: arguments of `take_steps`.
        per_node: ranks of a machine, for hybrids; None for all.
    """

    def work() -> list[Course]:
        return [take_steps(*case) for case in cases]

    local = {} if per_node is None else {"LOCAL_WORLD_SIZE": str(per_node)}
    by_rank = run_on_ranks(ranks, work, environment=local, seconds=120.0)
    return [list(courses) for courses in zip(*by_rank, strict=True)]
