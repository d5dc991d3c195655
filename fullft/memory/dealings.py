"""How the steps of a run may be dealt into micro-batches: by tokens, if the model's documents can share a row."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from fullft.config.config import Config
from fullft.data.batches import Batches
from fullft.data.dealing import Dealing, find_dealings
from fullft.errors import OptionsError

# Layers whose tokens see no other documents, if positions restart.
_ISOLATING_LAYERS = {"full_attention", "sliding_attention"}
# With dropout attention keeps its probabilities, as many as the square of a row's tokens, as families call it.
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")


@dataclass(frozen=True)
class Dealings:
    """What a plan may choose among.

    Attributes:
        config: with what there is no choice about.
        ways: to deal a step by tokens, those of the fewest micro-batches first; empty where that is not open.
        note: a line for the user that says why rows are not joined; else empty.
    """

    config: Config
    ways: tuple[Dealing, ...] = ()
    note: str = ""


def dealings_of_run(
    config: Config, model_config: PreTrainedConfig, train: Batches, saved: Mapping[str, Any]
) -> Dealings:
    """Return how a run may deal its steps; a resumed run deals them as before.

    Args:
        config: the batch sizes and the length of the run are read.
        model_config: of the model to train.
        train: the run's sequences.
        saved: the options of the run that is resumed; empty for a new one.

    Raises:
        OptionsError: a sequence has more tokens than a micro-batch may have.
    """
    if config.micro_batch_tokens is None and "micro_batch_tokens" in saved:
        config = replace(config, micro_batch_tokens=saved["micro_batch_tokens"])
    if config.micro_batch_tokens:
        if train.longest > config.micro_batch_tokens:
            raise OptionsError(
                f"micro_batch_tokens {config.micro_batch_tokens:,} is less than the longest sequence has, "
                f"{train.longest:,} tokens: raise it, or lower --max_length"
            )
        dealt = train.dealt(config.micro_batch_tokens)
        return Dealings(replace(config, gradient_accumulation_steps=dealt.most_micro_batches(config)))
    return _open(config, model_config) or Dealings(config, tuple(train.find_dealings(config)))


def dealings_of_plan(config: Config, model_config: PreTrainedConfig) -> Dealings:
    """Return how a run may deal its steps whose sequences are all as long as allowed.

    Args:
        config: the batch sizes are read.
        model_config: of the model to train.
    """
    step = [config.max_length] * config.global_batch_size
    if config.micro_batch_tokens:
        each = max(1, config.micro_batch_tokens // config.max_length)
        count = -(-len(step) // (each * config.gpus))
        return Dealings(replace(config, gradient_accumulation_steps=count))
    ways = find_dealings([step], config.gpus, config.max_length, sum(step))
    return _open(config, model_config) or Dealings(config, tuple(ways))


def _open(config: Config, model_config: PreTrainedConfig) -> Dealings | None:
    """Return what is left where rows are not joined; None where they are."""
    if config.micro_batch_tokens is not None:
        return Dealings(config)
    if reason := _why_not_joined(model_config):
        note = f"Each row is a micro-batch of its own, since {reason}; --per_device_train_batch_size pads several"
        return Dealings(replace(config, micro_batch_tokens=0), note=note)
    return None


def _why_not_joined(model_config: PreTrainedConfig) -> str:
    """Say why documents of this model should not share a row; an empty string if they may.

    What is said here of a family is checked on the loaded model, in `model/checks.py`.
    """
    text = model_config.get_text_config(decoder=True)
    family = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model_config), None)
    if family is None:
        return "its code comes with the model, and may not tell documents apart"
    takes_positions = "position_ids" in inspect.signature(family.forward).parameters
    others = set(getattr(text, "layer_types", None) or ()) - _ISOLATING_LAYERS
    if family._is_stateful or not takes_positions or others or not family._supports_attention_backend:
        return f"{family.__name__} does not tell documents apart by their positions"
    if not family._supports_sdpa:
        return f"the attention of {family.__name__} takes memory by the square of a row's tokens"
    if any(getattr(text, name, 0) for name in _DROPOUTS):
        return "attention with dropout takes memory by the square of a row's tokens"
    return ""
