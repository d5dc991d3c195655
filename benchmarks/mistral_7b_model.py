"""The model of `mistral_7b.py`: its sizes, its options, and a checkpoint of random bf16 weights."""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from mistral_7b_phases import GB, GIB
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedModel

from fullft.config.config import Config
from fullft.config.parse import parse_config
from fullft.memory.dealings import dealings_of_plan
from fullft.model.bundled import bundled_config
from fullft.model.parts import decoder_layers
from fullft.optim.adamw import state_layout
from fullft.optim.build import moments_of
from fullft.storage.tiers import CHUNK

WORK = Path(__file__).resolve().parent / "work"
MODEL = "mistralai/Mistral-7B-v0.1"
SEQUENCES = 2  # of a step. They are one micro-batch, as `--fit auto` deals a step that fits
LEARNING_RATE = 1e-4
SPARE = 3 * GB  # of disk, left to others
PLACES = {
    "resident": "optimizer=disk,gradients=disk",
    "streamed": "optimizer=disk,gradients=disk,parameters=disk",
}


@dataclass(frozen=True)
class Size:
    """A model in Mistral's shape.

    Attributes:
        changes: to the bundled config.
        tokens: of a sequence.
        probe: bytes of the file that the disk's speed is measured on.
    """

    changes: dict[str, int]
    tokens: int
    probe: int


_TINY = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 4}
_TINY |= {"num_attention_heads": 8, "num_key_value_heads": 2}
SIZES = {
    "7b": Size({}, 256, 4 * GIB),
    "1b": Size({"num_hidden_layers": 4}, 256, 2 * GIB),
    "tiny": Size(_TINY, 32, 2**26),
}


def model_config(size: str) -> MistralConfig:
    """Return the bundled config, in one of the sizes."""
    return MistralConfig(**{**(bundled_config(MODEL) or {}), **SIZES[size].changes})


def outline(size: str) -> PreTrainedModel:
    """Build the model with shapes alone, without bytes."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config(size), dtype=torch.bfloat16)


def initial_pieces(name: str, parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    """Make a parameter's first values piece by piece, the same ones each time.

    Args:
        name: the parameter's, which seeds them.
        parameter: its shape is read. Norms begin as ones.

    Yields:
        [at most `CHUNK`] bf16.
    """
    for start in range(0, parameter.numel(), CHUNK):
        piece = torch.ones(min(CHUNK, parameter.numel() - start), dtype=torch.bfloat16)
        if parameter.dim() > 1:
            seed = int.from_bytes(hashlib.blake2b(f"{name} {start}".encode(), digest_size=7).digest(), "little")
            piece.normal_(0, 0.02, generator=torch.Generator().manual_seed(seed))
        yield piece


def write_checkpoint(folder: Path, size: str) -> None:
    """Write config and weights, with one piece of a tensor in memory at a time.

    Args:
        folder: does not exist yet.
        size: a key of `SIZES`.
    """
    folder.mkdir(parents=True)
    parameters = dict(outline(size).named_parameters())
    model_config(size).save_pretrained(folder)
    shards = split_torch_state_dict_into_shards(parameters, max_shard_size="5GB")
    for file, names in shards.filename_to_tensors.items():
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            start, end = end, end + 2 * parameters[name].numel()
            header[name] = {"dtype": "BF16", "shape": list(parameters[name].shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as content:
            content.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                for piece in initial_pieces(name, parameters[name]):
                    content.write(piece.view(torch.uint8).numpy().data)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def tokens_per_step(size: str) -> int:
    """Return the tokens of a step, which are those of its micro-batch."""
    return SEQUENCES * SIZES[size].tokens


def options(size: str, weights: str, folder: Path, steps: int) -> Config:
    """Return the options, as `train.py` would read them from a command line, with the step dealt."""
    flags = ["--model", str(folder), "--output_dir", f"{folder}-out", "--max_steps", str(steps)]
    flags += ["--precision", "bf16-true", "--master_weights", "split", "--optim", "adamw_8bit"]
    flags += ["--activation_checkpointing", "full", "--offload", PLACES[weights]]
    flags += ["--global_batch_size", str(SEQUENCES), "--micro_batch_tokens", str(tokens_per_step(size))]
    flags += ["--max_length", str(SIZES[size].tokens)]
    flags += ["--learning_rate", str(LEARNING_RATE), "--lr_scheduler_type", "constant", "--max_grad_norm", "1.0"]
    return dealings_of_plan(parse_config(flags), model_config(size)).config


def require_disk(size: str, weights: str, folder: Path) -> None:
    """Print the disk space that a mode needs, and exit if it is not free.

    Args:
        size: a key of `SIZES`.
        weights: a key of `PLACES`.
        folder: of the checkpoint, on the disk.
    """
    model = outline(size)
    moments = moments_of(model, options(size, weights, folder, 1).numerics)
    count = sum(parameter.numel() for parameter in model.parameters())
    states = {"moments": 0, "remainders": 0}
    for parameter in model.parameters():
        for name, (numel, dtype) in state_layout(parameter, moments(parameter), "split").items():
            states["remainders" if name == "remainder" else "moments"] += numel * dtype.itemsize
    needs = {"source": 2 * count, **states, "gradients": 2 * count}
    total = sum(needs.values())
    if weights == "streamed":
        needs["weights' homes"] = homes = 2 * sum(each.numel() for each in decoder_layers(model).parameters())
        # The source is deleted once the weights are in their homes. States and gradients are made after that.
        total = max(needs["source"] + homes, total - needs["source"] + homes)
    free = shutil.disk_usage(folder.parent).free
    parts = ", ".join(f"{name} {size / GB:.1f}" for name, size in needs.items())
    deleted = "; the source is deleted once it is loaded" if weights == "streamed" else ""
    print(f"Disk: {total / GB:.1f} GB at most ({parts}{deleted}); {free / GB:.1f} GB are free", flush=True)
    if free < total + SPARE:
        sys.exit(
            f"{folder.parent} needs {(total + SPARE - free) / GB:.1f} GB more free space, {SPARE / GB:.0f} GB to spare"
        )
