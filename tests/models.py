"""Tiny models of the families that the tests speak of, made from configs in code."""

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
)

from fullft.config.config import Config, resolve
from fullft.config.options import Options
from fullft.data.micro_batch import MicroBatch
from fullft.model.loss import LossSum
from fullft.optim.adamw import AdamW
from fullft.optim.build import build_optimizer
from fullft.storage.tiers import Storage

VOCABULARY = 1024  # the demo tokenizer's
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}


def tiny_model(
    family: str,
    dtype: torch.dtype = torch.float64,
    dropout: float = 0.0,
    tied: bool = False,
    seed: int = 0,
    width: int = 32,
) -> PreTrainedModel:
    """Make a model with random weights, in training mode.

    Args:
        family: gpt2, llama, mistral (with a sliding window of 8 tokens), qwen2, gemma2 (soft-capped logits) or phi.
        dtype: of its weights.
        dropout: everywhere the family has it.
        tied: whether the head is the embedding (GPT-2's always is).
        seed: of the weights.
        width: of the hidden states; from 64 on matrices are large enough for moments in 8 bits.
    """
    sizes = {"hidden_size": width, "intermediate_size": 2 * width}
    shape = {**SHAPE, **sizes, "attention_dropout": dropout, "tie_word_embeddings": tied}
    configs = {
        "gpt2": lambda: GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=256,
            n_embd=width,
            n_layer=4,
            n_head=4,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            resid_pdrop=dropout,
            bos_token_id=0,
            eos_token_id=0,
        ),
        "llama": lambda: LlamaConfig(**shape),
        "mistral": lambda: MistralConfig(**shape, sliding_window=8),
        "qwen2": lambda: Qwen2Config(**shape),
        "gemma2": lambda: Gemma2Config(**shape, head_dim=8, sliding_window=8, final_logit_softcapping=5.0),
        "phi": lambda: PhiConfig(**shape, resid_pdrop=dropout, embd_pdrop=dropout),
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(configs[family](), dtype=dtype)
    # Norms and biases start at exactly 1 and 0, where some mistakes do not show.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.train()


def bf16_model(family: str) -> PreTrainedModel:
    """Make a model; Mixtral's experts are one tensor in memory and many in files."""
    if family != "mixtral":
        return tiny_model(family, torch.bfloat16, tied=family == "qwen2")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MixtralConfig(**SHAPE, num_local_experts=4), dtype=torch.bfloat16)


def summed_loss(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Compute the loop's loss of [batch, sequence] tokens that are all targets, not yet divided by their number."""
    return LossSum(model)(MicroBatch.of(ids))


def make_config(**options: object) -> Config:
    """Make resolved options, with the defaults that hold for a given model."""
    return resolve(Options(**{"model": "tiny", **options}))  # type: ignore[arg-type]


def optimizer_of(model: PreTrainedModel, config: Config, storage: Storage | None = None) -> AdamW:
    """Build the optimizer as train.py does, with a storage of its own unless one is given."""
    storage = storage or Storage(next(model.parameters()).device, config.output_dir)
    return build_optimizer(model, config, storage)
