"""Checkpoints: saved so that no crash leaves half of one, verified before they are trusted.

There is no pickle in one: tensors are in safetensors, the rest is JSON. Any number of ranks writes the same files.
`output_dir.py` installs a whole folder at once, `files.py` writes a whole file at once, `resuming.py` continues.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fullft.config.config import Config, to_words
from fullft.config.steps import Steps
from fullft.errors import CheckpointError
from fullft.optim.adamw import AdamW, block_of
from fullft.ranks import by_first_rank
from fullft.saving.files import hash_files, sha256, staged_folder, sync_folder
from fullft.saving.output_dir import (
    MANIFEST,
    delete_checkpoint,
    discard_earlier_run,
    install_checkpoint,
    list_checkpoints,
    own_checkpoints,
    step_of,
)
from fullft.saving.tensors import Stretch, write_tensors, writes
from fullft.saving.weights import MAX_SHARD_SIZE, save_weights
from fullft.storage.tiers import first_element

STATE = "trainer_state.json"
OPTIMIZER = "optimizer{suffix}.safetensors"  # several if they are large, so that ranks share the hashing


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk: its folder and the content of `trainer_state.json`."""

    folder: Path
    state: dict[str, Any]


# ---------------------------------------------------------------------------------------------- saving


def save_checkpoint(
    config: Config,
    steps: Steps,
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: AdamW,
    data_fingerprint: str,
    best: dict[str, Any] | None = None,
) -> Path:
    """Save everything that the next step depends on, then delete checkpoints beyond `save_total_limit`.

    Every rank calls it, and returns when the checkpoint is complete.

    Args:
        config: `output_dir` and `save_total_limit` are read. All options are saved, to be compared on resume.
        steps: says which epoch it is, and where in it.
        step: the last finished step.
        model: saved as `save_pretrained` does.
        tokenizer: saved next to it, so that the folder is a usable model.
        optimizer: its states go into `optimizer*.safetensors`.
        data_fingerprint: of the tokenised rows.
        best: the best checkpoint with this one, which is kept; see `best.py`.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    folder = config.output_dir / f"checkpoint-{step}"
    state = {
        "step": step,
        "total_steps": steps.total,
        "epoch": steps.epoch(step),
        "data": {
            "fingerprint": data_fingerprint,
            "epoch": step // steps.steps_per_epoch,
            "cursor": step % steps.steps_per_epoch,  # in global batches
            "global_batch_size": config.global_batch_size,
        },
        "schedule": {"lr_scheduler_type": config.lr_scheduler_type, "last_step": step},
        "optimizer": _step_counts(optimizer, model),
        "options": to_words(config),
        "best": best,
    }
    with staged_folder(folder) as staging:
        hashes = save_weights(model, staging)
        hashes |= write_tensors(_optimizer_files(optimizer, model, staging))

        def complete() -> None:
            tokenizer.save_pretrained(staging)
            (staging / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
            _write_manifest(staging, hashes)
            sync_folder(staging)
            install_checkpoint(staging, folder)
            discard_earlier_run(folder.parent)
            for old in _surplus(config, step, best):
                delete_checkpoint(old)

        by_first_rank(complete)
    return folder


def _write_manifest(folder: Path, hashes: dict[str, str]) -> None:
    """List the sha256 of all files of a folder; the small ones are still to be hashed."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    hashes = hashes | {name: sha256(file) for name, file in files.items() if name not in hashes}
    (folder / MANIFEST).write_text(json.dumps({"sha256": hashes}, indent=1), encoding="utf-8")


def _surplus(config: Config, step: int, best: dict[str, Any] | None) -> list[Path]:
    """List the checkpoints beyond `save_total_limit`, as Hugging Face's Trainer does: the best one is not among them.

    Nor is the newest one, so that the run can be resumed: with a limit of 1 there may be two.
    """
    limit, newest_first = config.save_total_limit, own_checkpoints(config.output_dir)
    if limit is None:
        return []
    others = [old for old in newest_first if step_of(old) <= step]
    kept = config.output_dir / best["checkpoint"] if best is not None else None
    if kept in others:
        limit = max(limit - 1, int(others[0] != kept))
        others.remove(kept)
    return others[limit:]


# ---------------------------------------------------------------------------------------------- states


def _optimizer_files(optimizer: AdamW, model: nn.Module, folder: Path) -> dict[Path, dict[str, Stretch]]:
    """Lay states out as `<parameter>.<state>`, each a flat tensor, in files of at most 5 GB."""
    states = {}
    for name, parameter in named_parameters(optimizer, model).items():
        for key, array in optimizer.states_of(parameter).items():
            length, first = -(-parameter.numel() // block_of(key)), first_element(parameter) // block_of(key)
            states[f"{name}.{key}"] = Stretch(array, (length,), first, writes(parameter))
    sizes = {name: torch.empty(each.shape, dtype=each.array.dtype, device="meta") for name, each in states.items()}
    plan = split_torch_state_dict_into_shards(sizes, filename_pattern=OPTIMIZER, max_shard_size=MAX_SHARD_SIZE)
    return {folder / file: {name: states[name] for name in names} for file, names in plan.filename_to_tensors.items()}


def named_parameters(optimizer: AdamW, model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters under their names in the model.

    Args:
        optimizer: trains them.
        model: theirs.

    Raises:
        KeyError: the model holds others in their place, such as gathered ones, which have no states.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: parameter for parameter in optimizer.parameters}


def _step_counts(optimizer: AdamW, model: nn.Module) -> dict[str, Any]:
    """Return how many steps there were, and for each parameter how many of them it has missed, if any."""
    missed = {
        name: optimizer.missed[id(parameter)]
        for name, parameter in named_parameters(optimizer, model).items()
        if id(parameter) in optimizer.missed
    }
    return {"num_steps": optimizer.num_steps, "missed": missed}


# ---------------------------------------------------------------------------------------------- verifying


def verify(folder: Path) -> Checkpoint:
    """Compare every file of a checkpoint with its manifest; the ranks share the files out among them.

    Args:
        folder: a `checkpoint-<step>` folder.

    Raises:
        CheckpointError: a file is missing or differs from what was written.
    """
    written = by_first_rank(lambda: _read_manifest(folder))
    found = hash_files([folder / name for name in written])
    for (name, expected), actual in zip(written.items(), found, strict=True):
        if actual != expected:
            raise CheckpointError(f"checkpoint {folder}: {name} is damaged; resume from another one")
    return by_first_rank(lambda: Checkpoint(folder, _read_json(folder / STATE)))


def _read_manifest(folder: Path) -> dict[str, str]:
    """Return the sha256 of a checkpoint's files, which are all there."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {folder}")
    if inside := list_checkpoints(folder):
        raise CheckpointError(
            f"{folder} holds {len(inside)} checkpoints: pass one, such as {inside[0]}, or --output_dir {folder} and a "
            "bare --resume_from_checkpoint"
        )
    hashes = _read_json(folder / MANIFEST).get("sha256")
    if not isinstance(hashes, dict):
        raise CheckpointError(f"{folder} is no checkpoint of this program: its {MANIFEST} lists no sha256")
    for name in hashes:
        if not (folder / name).is_file():
            raise CheckpointError(f"checkpoint {folder} lacks {name}: resume from another one")
    return hashes


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {file.parent} lacks {file.name}: resume from another one") from None
    except ValueError as error:
        raise CheckpointError(f"checkpoint {file.parent}: {file.name} is damaged ({error})") from error
    return dict(content)
