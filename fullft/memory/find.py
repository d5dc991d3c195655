"""The config that a plan starts from: found in a folder, among the bundled ones, or where the hub keeps it.

Owns finding it without weights, and refusing sizes that no model has.
"""

from collections.abc import Iterator
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from fullft.config import Config
from fullft.errors import ModelError
from fullft.model import DEMO_MODEL, loading, model_folder, require_trainable
from fullft.model_configs import bundled_config

MOST_PARAMETERS = 10**13
# What families call the same size; GPT-2's names come second.
_WIDTH, _LAYERS = ("hidden_size", "n_embd", "d_model"), ("num_hidden_layers", "n_layer")
_HEADS, _VALUE_HEADS = ("num_attention_heads", "n_head"), ("num_key_value_heads",)
_INNER, _VOCABULARY = ("intermediate_size", "n_inner"), ("vocab_size",)
_POSITIONS = ("max_position_embeddings", "n_positions")


def find_config(config: Config) -> PreTrainedConfig:
    """Find and check a model's config; its weights need not exist.

    Args:
        config: `model` and `trust_remote_code` count.

    Raises:
        ModelError: there is none, it is no causal language model's, or it has absurd sizes.
    """
    transformers_logging.set_verbosity_error()
    name = config.model if config.model is not None else str(DEMO_MODEL)
    if model_folder(name) is None and (values := bundled_config(name)) is not None:
        return AutoConfig.for_model(**values)
    with loading(name):
        require_sane_sizes(PreTrainedConfig.get_config_dict(name)[0], name)
        model_config = AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    require_trainable(model_config, name)
    is_decoder = getattr(model_config, "is_decoder", True)
    if not is_decoder and not any("CausalLM" in each for each in model_config.architectures or []):
        raise ModelError(
            f"{name} is a {model_config.model_type} model whose tokens see those after them, not a causal language "
            "model: choose a decoder such as mistralai/Mistral-7B-v0.1"
        )
    return model_config


def require_sane_sizes(values: dict[str, Any], name: str) -> None:
    """Check a config's sizes before transformers builds anything of them.

    Args:
        values: of `config.json`.
        name: what the user calls the model.

    Raises:
        ModelError: a size is no whole number above 0, sizes do not divide, or the model exceeds `MOST_PARAMETERS`.
    """
    if problem := next(_size_problems(values), None):
        raise ModelError(f"the config.json of {name} is absurd: {problem}; download it again, or correct it")


def _size_problems(values: dict[str, Any]) -> Iterator[str]:
    if isinstance(text := values.get("text_config"), dict):
        yield from _size_problems(text)
    for field in (*_WIDTH, *_LAYERS, *_HEADS, *_VALUE_HEADS, *_INNER, *_VOCABULARY, *_POSITIONS):
        size = values.get(field)
        is_number = isinstance(size, int) and not isinstance(size, bool)
        if size is not None and not isinstance(size, list) and not (is_number and size > 0):
            yield f"{field} is {size!r}, not a whole number above 0"
    width, layers, heads = (_first(values, names) for names in (_WIDTH, _LAYERS, _HEADS))
    value_heads, vocabulary = _first(values, _VALUE_HEADS), _first(values, _VOCABULARY) or 0
    if width and heads and width % heads and not values.get("head_dim"):
        yield f"the width {width} is not divisible by {heads} attention heads"
    if heads and value_heads and heads % value_heads:
        yield f"{heads} attention heads cannot share {value_heads} key-value heads"
    if width and layers:
        parameters = width * (vocabulary + layers * (2 * width + 2 * (_first(values, _INNER) or width)))
        if parameters > MOST_PARAMETERS:
            yield f"its sizes make {parameters:.1e} parameters, more than any model has"


def _first(values: dict[str, Any], names: tuple[str, ...]) -> int | None:
    return next((values[name] for name in names if isinstance(values.get(name), int)), None)
