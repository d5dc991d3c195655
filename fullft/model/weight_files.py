"""The weights files of a model: where they are, and what their headers say of the numbers in them.

Loading itself is in `load.py`. transformers converts whatever dtype it finds: 8-bit weights whose scales it does not
know would be trained as numbers hundreds of times too large.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, cached_file

from fullft.errors import ModelError

_TRAINABLE = {"F64", "F32", "F16", "BF16"}
# What the dtypes of .bin files are called in safetensors.
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def safetensors_files(source: str) -> list[Path]:
    """List the safetensors files that transformers loads, those of a hub id from its cache; none for other formats.

    Args:
        source: folder or hub id, whose files are downloaded if they are not there yet.
    """
    return _files(source, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, only_local=False)


def require_trainable_numbers(source: str, model_config: PreTrainedConfig) -> None:
    """Check by the files at hand that weights are floating-point numbers of 16 bits or more.

    Integer and boolean buffers stay as they are: old checkpoints hold masks (GPT-2's `attn.bias`).

    Args:
        source: folder or hub id. What has not been downloaded is not checked.
        model_config: of the model; its parameters' names are looked up where files hold integers.

    Raises:
        ModelError: some weights are narrower, so quantised.
    """
    narrow = {name: dtype for name, dtype in _stored_dtypes(source) if dtype not in _TRAINABLE}
    # No buffer is a narrow float, and what quantisers make of a weight is called weight, qweight, weight_packed, ...
    found = [name for name, dtype in narrow.items() if dtype.startswith("F") or "weight" in name.rpartition(".")[2]]
    if narrow and not found:
        parameters = _parameter_names(model_config)
        found = [name for name in narrow if any(parameter in name for parameter in parameters)]
    if found:
        raise ModelError(
            f"the weights of {source} are quantised: {len(found)} tensors such as {min(found)} hold "
            f"{narrow[min(found)]} numbers, whose scales would be ignored; pass the original model, or one that was "
            "dequantised to bf16"
        )


def _parameter_names(model_config: PreTrainedConfig) -> set[str]:
    """Return the names of a model's parameters, each with and without its prefix; none if it cannot be built."""
    with suppress(Exception), torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(model_config)
        names = {name for name, _ in model.named_parameters()}
        return names | {name.removeprefix(f"{model.base_model_prefix}.") for name in names}
    return set()


def _stored_dtypes(source: str) -> Iterator[tuple[str, str]]:
    """Yield the name and dtype of each tensor in the local files that transformers would load."""
    if files := _files(source, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, only_local=True):
        for file in files:
            yield from _header(file)
        return
    for file in _files(source, WEIGHTS_NAME, WEIGHTS_INDEX_NAME, only_local=True):
        with suppress(Exception):  # an old format, or damaged, which loading reports
            tensors = torch.load(file, map_location="meta", weights_only=True, mmap=True)
            for name, tensor in tensors.items():
                yield name, _NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch.").upper())


def _header(file: Path) -> Iterator[tuple[str, str]]:
    """Read a safetensors file's header; its own library refuses files with dtypes that it does not know."""
    with suppress(OSError, ValueError, AttributeError, KeyError), file.open("rb") as content:
        size = int.from_bytes(content.read(8), "little")
        if size <= file.stat().st_size:
            for name, tensor in json.loads(content.read(size)).items():
                if name != "__metadata__":
                    yield name, str(tensor["dtype"])


def _files(source: str, single: str, index: str, *, only_local: bool) -> list[Path]:
    def find(name: str) -> Path | None:
        file = cached_file(
            source,
            name,
            local_files_only=only_local,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if file is None else Path(file)

    if (whole := find(single)) is not None:
        return [whole]
    if (found := find(index)) is None:
        return []
    shards = sorted(set(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values()))
    return [file for shard in shards if (file := find(shard)) is not None]
