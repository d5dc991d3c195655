"""Where a model comes from: its config, weights and tokenizer, in a folder, among the bundled configs or on the hub.

What is no causal language model, not complete, or of absurd sizes is refused here, before anything is built.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode, try_to_load_from_cache
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import has_file
from transformers.utils import logging as transformers_logging

from fullft.config.config import Config
from fullft.config.options import DEMO_FOLDER
from fullft.errors import FullftError, ModelError, exhaustion
from fullft.model.bundled import bundled_config
from fullft.model.extra_losses import require_cross_entropy_alone
from fullft.model.weight_files import require_trainable_numbers

DEMO_MODEL = DEMO_FOLDER / "model"
_WEIGHT_FILES = ("*.safetensors", "*.bin")
_HUB_WEIGHT_FILES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)

MOST_PARAMETERS = 10**13
# What families call the same size; GPT-2's names come second.
_WIDTH, _LAYERS = ("hidden_size", "n_embd", "d_model"), ("num_hidden_layers", "n_layer")
_HEADS, _VALUE_HEADS = ("num_attention_heads", "n_head"), ("num_key_value_heads",)
_INNER, _VOCABULARY = ("intermediate_size", "n_inner"), ("vocab_size",)
_POSITIONS = ("max_position_embeddings", "n_positions")


def find_model(config: Config) -> str:
    """Return the folder or hub id to load from, after checking that weights are there; `find_config` checks the rest.

    Args:
        config: `model` is read.

    Raises:
        ModelError: the folder, its weights, or the hub's copy is missing.
    """
    transformers_logging.set_verbosity_error()  # its advice is for callers of its API, not for our users
    if config.model is None:
        return str(DEMO_MODEL)
    if (folder := model_folder(config.model)) is not None:
        require_weights(folder, f"model folder {folder}")
    else:
        with loading(config.model):
            _require_hub_weights(config.model)
    return config.model


def find_config(config: Config) -> PreTrainedConfig:
    """Find and check a model's config; its weights need not exist, but those at hand are checked.

    Args:
        config: `model` and `trust_remote_code` are read.

    Raises:
        ModelError: there is none, it is no causal language model's, it has absurd sizes, or the weights at hand are
            quantised.
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
    with loading(name):
        require_trainable_numbers(name, model_config)
    return model_config


def load_tokenizer(config: Config, source: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model.

    Args:
        config: `trust_remote_code` is read.
        source: folder or hub id, from `find_model`.

    Raises:
        ModelError: there is none, or it cannot map tokens back to characters, or it has no end-of-sequence token.
    """
    with loading(source):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    if not tokenizer("a").input_ids:
        raise ModelError(f"{source} has no tokenizer files: copy tokenizer.json next to the weights")
    if not tokenizer.is_fast:
        raise ModelError(
            f"{source} has no tokenizer.json: prompts are masked by character offsets, which need it; "
            "save the model's fast tokenizer there"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {source} has no eos_token: set one in tokenizer_config.json, since every row ends "
            "with it"
        )
    return tokenizer


def model_folder(name: str) -> Path | None:
    """Return the folder that a model's name stands for, or None for a hub id.

    Args:
        name: as the user gives it.

    Raises:
        ModelError: it can only be a folder, but is none, or none with a model in it.
    """
    folder = Path(name)
    if not folder.is_dir():
        if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ModelError(f"there is no model folder {folder}: pass an existing folder or a hub id")
        return None
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder} holds an adapter, not a model: merge it into its base model and pass the result")
    if not (folder / "config.json").is_file():
        raise ModelError(f"model folder {folder} has no config.json: pass the folder that save_pretrained wrote")
    return folder


def _require_hub_weights(name: str) -> None:
    """Check that a model's weights can be had: from the hub if it is reached, else from its cache."""
    if not is_offline_mode():
        if not any(has_file(name, file) for file in _HUB_WEIGHT_FILES):
            raise ModelError(f"{name} has no weights (*.safetensors) on the hub: choose a model that has")
        return
    cached = try_to_load_from_cache(name, "config.json")
    if not isinstance(cached, str):
        raise FileNotFoundError(name)  # which `loading` explains
    require_weights(Path(cached).parent, f"{name} in the hub's cache (there is no network)")


def require_weights(folder: Path, title: str) -> None:
    """Check that weights are there, and every file of them that an index names.

    Args:
        folder: of the model.
        title: what to call it in a message.

    Raises:
        ModelError: there are none, or not all; naming the first one that is missing.
    """
    if not any(next(folder.glob(pattern), None) for pattern in _WEIGHT_FILES):
        raise ModelError(f"{title} has no weights (*.safetensors): download it again, completely")
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError):
        raise ModelError(f"{index} is damaged: download the model again") from None
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise ModelError(
            f"{title} lacks {len(missing)} of {len(shards)} weights files, such as {missing[0]}: "
            "download it again, completely"
        )


def require_trainable(model_config: PreTrainedConfig, name: str) -> None:
    """Check that a config describes a causal language model whose weights can be trained.

    Args:
        model_config: as loaded.
        name: what the user calls the model.

    Raises:
        ModelError: it is another kind of model, its weights are quantised, or it asks for a loss that is not offered.
    """
    remote = getattr(model_config, "auto_map", None) or {}
    is_causal = "AutoModelForCausalLM" in remote or type(model_config) in AutoModelForCausalLM._model_mapping
    masked = [each for each in model_config.architectures or [] if "MaskedLM" in each or "ForPreTraining" in each]
    if masked or not is_causal:
        raise ModelError(
            f"{name} is a {model_config.model_type} model, not a causal language model: choose a decoder such as "
            "mistralai/Mistral-7B-v0.1"
        )
    if getattr(model_config, "quantization_config", None):
        raise ModelError(f"the weights of {name} are quantised, and cannot be trained: pass the original model")
    require_cross_entropy_alone(model_config, name)


def load_generation_config(model: PreTrainedModel, source: str) -> None:
    """Give a model that was built from its config the generation config that comes with its weights, if there is one.

    Args:
        model: changed in place.
        source: folder or hub id.
    """
    if model.can_generate():
        with suppress(OSError):  # there need not be one
            model.generation_config = GenerationConfig.from_pretrained(source)


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Translate what transformers and the hub raise into one message with a remedy.

    Args:
        name: what the user calls the model.

    Raises:
        ModelError: for whatever the body raises, but memory or disk running out.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, FullftError):
            raise
        if (exhausted := exhaustion(error)) is not None:
            raise exhausted from error
        causes = _causes(error)
        kinds = {type(cause).__name__ for cause in causes}
        text = " ".join(str(causes[-1]).split())
        if "trust_remote_code" in text:
            raise ModelError(f"{name} comes with its own code: read it, then pass --trust_remote_code") from error
        if kinds & {"GatedRepoError"} or "gated" in text.lower():
            raise ModelError(
                f"{name} is gated: accept its licence on its hub page, then log in with `hf auth login`"
            ) from error
        if not Path(name).is_dir() and isinstance(error, OSError):
            raise ModelError(
                f"model {name} was found neither as a folder, nor in the hub's cache, nor on the hub (network?)\n"
                f"download it with `hf download {name} --local-dir {Path(name).name}` and pass "
                f"--model {Path(name).name}; a gated model needs its licence accepted and `hf auth login` first"
            ) from error
        if "SafetensorError" in kinds:
            raise ModelError(
                f"a weights file of {name} is damaged or incomplete ({text[:200]}): download it again"
            ) from error
        raise ModelError(f"cannot load {name} ({type(causes[-1]).__name__}: {text[:300]})") from error


def _causes(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[0].__cause__ or chain[0].__context__) is not None and len(chain) < 10:
        chain.insert(0, cause)
    return chain


def require_sane_sizes(values: dict[str, Any], name: str) -> None:
    """Check a config's sizes before transformers builds anything of them.

    Args:
        values: of `config.json`.
        name: what the user calls the model.

    Raises:
        ModelError: a size is no whole number above 0, sizes do not divide, or the model exceeds `MOST_PARAMETERS`.
    """
    if problem := next(_size_problems(values), None):
        raise ModelError(f"the config.json of {name} has impossible sizes: {problem}; download it again, or correct it")


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
