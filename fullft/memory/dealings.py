"""How the steps of a run may be dealt into micro-batches: by tokens, if the model's documents can share a row."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig

from fullft.attention.choice import why_not_joined
from fullft.config.config import Config
from fullft.data.batches import Batches
from fullft.data.dealing import Dealing, find_dealings, most_micro_batches
from fullft.errors import OptionsError
from fullft.memory.plan import planned_device_type


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
        return Dealings(replace(config, gradient_accumulation_steps=train.dealt(config).most_micro_batches(config)))
    return _settled(config, model_config) or Dealings(config, tuple(train.find_dealings(config)))


def dealings_of_plan(config: Config, model_config: PreTrainedConfig) -> Dealings:
    """Return how a run may deal its steps whose sequences are all as long as allowed.

    Args:
        config: the batch sizes are read.
        model_config: of the model to train.
    """
    step = [config.max_length] * config.global_batch_size
    if config.micro_batch_tokens:
        count = most_micro_batches([step], config.micro_batch_tokens, config.gpus)
        return Dealings(replace(config, gradient_accumulation_steps=count))
    ways = find_dealings([step], config.gpus, config.max_length, sum(step))
    return _settled(config, model_config) or Dealings(config, tuple(ways))


def _settled(config: Config, model_config: PreTrainedConfig) -> Dealings | None:
    """Return what is left where a step is not dealt by tokens; None where it is."""
    reason = why_not_joined(model_config, planned_device_type(config))
    if config.micro_batch_tokens is None:
        if not reason:
            return None
        note = f"Each row is a micro-batch of its own, since {reason}; --per_device_train_batch_size pads several"
        return Dealings(replace(config, micro_batch_tokens=0), note=note)
    # Of a plan without rows, all are as long.
    is_padded = bool(reason) and config.per_device_train_batch_size > 1 and not config.plan
    note = f"The sequences of a micro-batch are padded to the longest of them, since {reason}" if is_padded else ""
    return Dealings(replace(config, isolates_documents=not reason), note=note)
