"""The model and its tokenizer: found and understood.

Owns where a model comes from, the dtypes that a precision means, which modules are the decoder layers, and the checks
that a model can be trained at all. How its weights get in and out is `weights.py`'s business.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import is_offline_mode, try_to_load_from_cache
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import has_file
from transformers.utils import logging as transformers_logging

from fullft.attention import apply_document_attention, revert_document_attention
from fullft.config import DEMO_FOLDER, Config
from fullft.errors import FullftError, ModelError, OptionsError, exhaustion

DEMO_MODEL = DEMO_FOLDER / "model"
_WEIGHT_FILES = ("*.safetensors", "*.bin")
_HUB_WEIGHT_FILES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


@dataclass(frozen=True)
class Precision:
    """What `--precision` means: the dtype that weights are kept in, and whether autocast computes in bf16."""

    weights: torch.dtype
    autocast: bool
    meaning: str


PRECISIONS = {
    "fp32": Precision(torch.float32, False, "weights, gradients and computation in fp32"),
    "bf16-mixed": Precision(
        torch.float32, True, "weights and gradients in fp32, computation in bf16 under torch.autocast"
    ),
    "bf16-true": Precision(torch.bfloat16, False, "weights, gradients and computation in bf16"),
}


def pick_device() -> torch.device:
    """Choose this machine's accelerator, or the CPU where there is none."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


# ---------------------------------------------------------------------------------------------- finding


def find_model(config: Config) -> str:
    """Give the folder or hub id to load from, after checking that weights are there; `find_config` checks the rest.

    Args:
        config: `model` counts.

    Raises:
        ModelError: the folder, its weights, or the hub's copy is missing.
    """
    transformers_logging.set_verbosity_error()  # its advice is addressed to callers of its API, not to our users
    if config.model is None:
        return str(DEMO_MODEL)
    if (folder := model_folder(config.model)) is not None:
        require_weights(folder, f"model folder {folder}")
    else:
        with loading(config.model):
            _require_hub_weights(config.model)
    return config.model


def model_folder(name: str) -> Path | None:
    """Give the folder that a model's name stands for, or None for a hub id.

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
    require_weights(Path(cached).parent, f"{name} in the hub's cache, which is all there is without network,")


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
        ModelError: it is another kind of model, or its weights are quantised.
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


# ---------------------------------------------------------------------------------------------- loading


def load_tokenizer(config: Config, source: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model.

    Args:
        config: `trust_remote_code` counts.
        source: folder or hub id, from `find_model`.

    Raises:
        ModelError: there is none, or it cannot map tokens back to characters, or it has no end-of-sequence token.
    """
    with loading(source):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    if not tokenizer("a").input_ids:
        raise ModelError(f"{source} has no tokenizer files: copy tokenizer.json beside the weights")
    if not tokenizer.is_fast:
        raise ModelError(f"{source} has no tokenizer.json: prompts are masked by character offsets, which need it")
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {source} has no eos_token: without it no row could end")
    return tokenizer


# ---------------------------------------------------------------------------------------------- understanding


def count_parameters(model: nn.Module) -> int:
    """Count trainable parameters; tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def describe_model(config: Config, model: PreTrainedModel) -> str:
    """Say how many parameters are trained, where and in which precision, and warn of what that costs.

    Args:
        config: `precision` counts.
        model: on its device.
    """
    count = count_parameters(model)
    scale, letter = next(((s, n) for s, n in ((1e9, "B"), (1e6, "M"), (1e3, "K")) if count >= s), (1, ""))
    lines = [
        f"Total trainable parameters: {count:,} ({count / scale:.2f}{letter})",
        f"Precision: {config.precision} on {model.device}: {PRECISIONS[config.precision].meaning}",
    ]
    if config.precision == "bf16-true" and config.master_weights == "none":
        lines.append(
            "warning: bf16 weights round away updates below 1/512 of a weight; --master_weights split keeps them"
        )
    if model.device.type == "cuda" and config.precision != "fp32" and not torch.cuda.is_bf16_supported(False):
        lines.append("warning: this GPU has no bf16 units and emulates them slowly: --precision fp32 may be faster")
    return "\n".join(lines)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Find the stack of decoder layers, whatever the family calls it (`h`, `layers`, `blocks`, ...).

    Args:
        model: a causal language model.

    Raises:
        ModelError: no list of modules has as many entries as the config has layers.
    """
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    # In the decoder first: a model that also sees or hears has other stacks, perhaps as high.
    for part in (model.get_decoder(), model):
        for module in part.modules() if isinstance(part, nn.Module) else []:
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return module
    raise ModelError(
        f"no decoder layers were found in {type(model).__name__}: --activation_checkpointing none trains without them"
    )


def require_fit(model: PreTrainedModel, largest_token_id: int, longest: int, packing: bool) -> None:
    """Check that the data and the model belong together, and settle how it attends.

    Args:
        model: the loaded model; it may attend by `attention.py` from now on.
        largest_token_id: over all rows.
        longest: tokens of the longest sequence.
        packing: whether sequences hold several documents.

    Raises:
        ModelError: a token has no embedding; a token sees what comes after it; with packing, a document sees another.
        OptionsError: sequences are longer than the model has positions.
    """
    embeddings = model.get_input_embeddings().weight.shape[0]
    if largest_token_id >= embeddings:
        raise ModelError(
            f"the data has token {largest_token_id}, the model only {embeddings} embeddings: the tokenizer and the "
            "weights do not belong together"
        )
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions and longest > positions:
        raise OptionsError(
            f"max_length: a sequence of {longest} tokens is longer than the model's {positions} positions"
            f": pass --max_length {positions}"
        )
    _settle_attention(model, packing)
    _require_causal_attention(model)
    if packing:
        _require_isolation(model)


@torch.no_grad()
def _probe(model: PreTrainedModel, token_ids: list[int], positions: list[int] | None = None) -> torch.Tensor:
    """Compute logits [tokens, vocabulary] of one short sequence, without dropout."""
    training = model.training
    model.eval()
    inputs = {"input_ids": torch.tensor([token_ids], device=model.device)}
    if positions is not None:
        inputs["position_ids"] = torch.tensor([positions], device=model.device)
    logits: torch.Tensor = model(**inputs, use_cache=False).logits[0].float()
    model.train(training)
    return logits


# Two documents for the probes: token ids that every vocabulary has.
_PROBE = list(range(1, 33))


def _settle_attention(model: PreTrainedModel, packing: bool) -> None:
    """Let the model attend within documents by our own code, where that gives what its own gives."""
    positions = list(range(len(_PROBE))) * 2 if packing else None
    probe = _PROBE + _PROBE[::-1]
    theirs = _probe(model, probe, positions)
    apply_document_attention(model)
    ours = _probe(model, probe, positions)
    if (ours - theirs).abs().max() > _tolerance(model, theirs):
        revert_document_attention(model)


def _tolerance(model: PreTrainedModel, logits: torch.Tensor) -> torch.Tensor:
    """Say how far another kernel's rounding may move logits; what a leak adds is more."""
    return (1e-4 if model.dtype == torch.float32 else 5e-2) * logits.abs().max()


def _require_causal_attention(model: PreTrainedModel) -> None:
    seen, changed = _probe(model, [*_PROBE, 1]), _probe(model, [*_PROBE, 2])
    if not torch.equal(seen[:-1], changed[:-1]):
        raise ModelError(f"{type(model).__name__} lets a token see the tokens after it: it is no causal language model")


def _require_isolation(model: PreTrainedModel) -> None:
    """Check that a document gives the same logits behind any other one, to the bit, and nearly the same alone."""
    positions = list(range(len(_PROBE))) * 2
    try:
        behind = _probe(model, _PROBE + _PROBE, positions)[len(_PROBE) :]
        behind_another = _probe(model, _PROBE[::-1] + _PROBE, positions)[len(_PROBE) :]
    except TypeError as error:
        raise ModelError(f"{type(model).__name__} takes no position_ids: train it without --packing") from error
    alone = _probe(model, _PROBE, positions[: len(_PROBE)])
    if not torch.equal(behind, behind_another) or (behind - alone).abs().max() > _tolerance(model, alone):
        raise ModelError(f"{type(model).__name__} lets packed documents see each other: train it without --packing")


def flops_per_token(model: PreTrainedModel, mean_length: float) -> float:
    """Count the floating-point operations of forward and backward, per token, without recomputation.

    Args:
        model: every parameter but the input embeddings multiplies each token once.
        mean_length: tokens per sequence, for attention's share.

    Source: Chowdhery et al., "PaLM" (2022), appendix B: 6 N + 12 layers x width x length.
    """
    text = model.config.get_text_config(decoder=True)
    parameters = count_parameters(model)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        parameters -= embeddings.weight.numel()  # looked up, not multiplied; tied ones are the head's matrix
    attention = text.num_hidden_layers * text.hidden_size * mean_length
    return float(6 * parameters + 12 * attention)
