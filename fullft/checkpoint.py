"""Checkpoints: saved so that no crash leaves half of one, verified before they are trusted, resumed to the bit.

Owns `checkpoint-<step>/` and the atomic write of folders. No pickle: tensors in safetensors, the rest in JSON.
"""

import base64
import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fullft.calendar import Calendar
from fullft.config import NEWEST, Config
from fullft.errors import CheckpointError, DiskError, OptionsError
from fullft.optimizer import estimate_state_bytes
from fullft.options import by_name

MANIFEST = "manifest.json"
STATE = "trainer_state.json"
OPTIMIZER = "optimizer.safetensors"
MAX_SHARD_SIZE = "5GB"
_HASH_CHUNK = 1 << 24  # bytes


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk: its folder and the content of `trainer_state.json`."""

    folder: Path
    state: dict[str, Any]


# ---------------------------------------------------------------------------------------------- saving


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Write a folder under a temporary name; it gets its own only when every byte of it is on disk.

    Args:
        target: the folder to be; an older one of that name is replaced at the last moment.

    Yields:
        The temporary folder to write into.
    """
    staging = target.parent / f".{target.name}.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        for path in [*staging.rglob("*"), staging]:
            _sync(path)
        if target.exists():
            retired = target.parent / f".{target.name}.old"
            shutil.rmtree(retired, ignore_errors=True)
            target.rename(retired)
            staging.rename(target)
            _keep_foreign_files(retired, target)
        else:
            staging.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _keep_foreign_files(retired: Path, target: Path) -> None:
    """Delete a replaced checkpoint, and move what somebody else put into it to its successor."""
    if (retired / MANIFEST).is_file():
        delete_checkpoint(retired)
    if retired.exists():
        for path in retired.iterdir():
            if not (target / path.name).exists():
                path.rename(target / path.name)
        shutil.rmtree(retired)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(
    config: Config,
    calendar: Calendar,
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    data_fingerprint: str,
) -> Path:
    """Save everything that the next step depends on, then delete checkpoints beyond `save_total_limit`.

    Args:
        config: `output_dir`, `save_total_limit`; all of it is kept, to be compared on resume.
        calendar: gives the epoch and the place in it.
        step: the last finished step.
        model: saved as `save_pretrained` does.
        tokenizer: saved beside it, so that the folder is a usable model.
        optimizer: its states go into `optimizer.safetensors`.
        data_fingerprint: of the tokenised rows.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    folder = Path(str(config.output_dir)) / f"checkpoint-{step}"
    tensors, scalars = _optimizer_state(optimizer, model)
    state = {
        "step": step,
        "total_steps": calendar.total_steps,
        "epoch": calendar.epoch(step),
        "data": {
            "fingerprint": data_fingerprint,
            "epoch": step // calendar.steps_per_epoch,
            "cursor": step % calendar.steps_per_epoch,
        },
        "schedule": {"lr_scheduler_type": config.lr_scheduler_type, "last_step": step},
        "rng": _random_states(model.device),
        "optimizer": scalars,
        "options": dataclasses.asdict(config),
    }
    with staged_folder(folder) as staging:
        model.save_pretrained(staging, max_shard_size=MAX_SHARD_SIZE)
        tokenizer.save_pretrained(staging)
        save_file(tensors, staging / OPTIMIZER)
        (staging / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        hashes = {
            str(file.relative_to(staging)): _sha256(file) for file in sorted(staging.rglob("*")) if file.is_file()
        }
        (staging / MANIFEST).write_text(json.dumps({"sha256": hashes}, indent=1), encoding="utf-8")
    if config.save_total_limit is not None:
        for old in list_checkpoints(folder.parent)[config.save_total_limit :]:
            delete_checkpoint(old)
    return folder


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:  # read, not mapped: a truncated map ends the process with SIGBUS
        while chunk := content.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Collect states as `<parameter>.<state>`: tensors, and plain numbers apart."""
    tensors, scalars = {}, {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor):
                # Cloned on the host if need be: tensors such as bitsandbytes' code book are shared between parameters.
                tensors[f"{name}.{key}"] = value.clone() if key.startswith("qmap") else value.contiguous()
            else:
                scalars[f"{name}.{key}"] = value
    return tensors, scalars


def _random_states(device: torch.device) -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return {kind: base64.b64encode(state.numpy().tobytes()).decode() for kind, state in states.items()}


# ---------------------------------------------------------------------------------------------- finding


def list_checkpoints(output_dir: Path) -> list[Path]:
    """List `checkpoint-<step>` folders, the newest step first."""
    folders = output_dir.glob("checkpoint-*") if output_dir.is_dir() else []
    steps = [(int(match[1]), folder) for folder in folders if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name))]
    return [folder for _, folder in sorted(steps, reverse=True)]


def delete_checkpoint(folder: Path) -> None:
    """Delete the files that a checkpoint's manifest lists, and the folder if nobody put anything else there."""
    for name in [*_read_json(folder / MANIFEST)["sha256"], MANIFEST]:
        (folder / name).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def open_checkpoint(config: Config) -> Checkpoint | None:
    """Find and verify the checkpoint to resume from.

    Args:
        config: `resume_from_checkpoint`, `output_dir` and `allow_changes` count.

    Returns:
        None when the run does not resume one.

    Raises:
        CheckpointError: it is missing or damaged; a bare flag passes over damaged ones to the newest good one.
        OptionsError: it was made with other options, and `--allow_changes` is not given.
    """
    if config.resume_from_checkpoint is None:
        return None
    if config.resume_from_checkpoint != NEWEST:
        checkpoint = verify(Path(config.resume_from_checkpoint))
    else:
        checkpoint = _newest_good(Path(str(config.output_dir)))
    if not config.allow_changes and (changed := _changed_options(config, checkpoint.state["options"])):
        raise OptionsError(
            f"{checkpoint.folder} was made with other options: {'; '.join(changed)}\n"
            "restore them, or pass --allow_changes"
        )
    return checkpoint


def _newest_good(output_dir: Path) -> Checkpoint:
    for folder in list_checkpoints(output_dir):
        try:
            return verify(folder)
        except CheckpointError as error:
            print(f"warning: passing over {error}")
    raise CheckpointError(f"{output_dir} has no good checkpoint: start without --resume_from_checkpoint")


def verify(folder: Path) -> Checkpoint:
    """Compare every file of a checkpoint with its manifest.

    Args:
        folder: a `checkpoint-<step>` folder.

    Raises:
        CheckpointError: a file is missing or differs from what was written.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {folder}")
    if inside := list_checkpoints(folder):
        raise CheckpointError(
            f"{folder} holds {len(inside)} checkpoints: pass one, such as {inside[0]}, or --output_dir {folder} and a "
            "bare --resume_from_checkpoint"
        )
    for name, written in _read_json(folder / MANIFEST)["sha256"].items():
        if not (folder / name).is_file():
            raise CheckpointError(f"checkpoint {folder} lacks {name}: resume from another one")
        if _sha256(folder / name) != written:
            raise CheckpointError(f"checkpoint {folder}: {name} is damaged; resume from another one")
    return Checkpoint(folder, _read_json(folder / STATE))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {file.parent} lacks {file.name}: resume from another one") from None
    except ValueError as error:
        raise CheckpointError(f"checkpoint {file.parent}: {file.name} is damaged ({error})") from error
    return dict(content)


def _changed_options(config: Config, saved: dict[str, Any]) -> list[str]:
    now = dataclasses.asdict(config)
    return [
        f"{name} was {saved.get(name)}, is {now[name]}"
        for name, option in by_name(Config).items()
        if not option.metadata["may_change"] and saved.get(name) != now[name]
    ]


# ---------------------------------------------------------------------------------------------- resuming


def restore(
    checkpoint: Checkpoint | None,
    config: Config,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    data_fingerprint: str,
) -> int:
    """Put optimizer and random states back. The weights are already there: the model was loaded from the checkpoint.

    Args:
        checkpoint: None starts afresh.
        config: `optim` and `allow_changes` count.
        model: on its device.
        optimizer: filled in place, every state in the dtype that it was saved in.
        data_fingerprint: of the rows as they are now.

    Returns:
        The last finished step; 0 for a new run.

    Raises:
        CheckpointError: the data or the optimizer is not the one that the checkpoint was made with.
    """
    if checkpoint is None:
        return 0
    state = checkpoint.state
    if state["data"]["fingerprint"] != data_fingerprint and not config.allow_changes:
        raise CheckpointError(
            f"the data has changed since {checkpoint.folder} was saved: restore it, or --allow_changes"
        )
    if state["options"]["optim"] != config.optim:
        raise CheckpointError(f"{checkpoint.folder} holds states of --optim {state['options']['optim']}: pass that")
    _load_optimizer_state(optimizer, model, load_file(checkpoint.folder / OPTIMIZER), state["optimizer"])
    for kind, encoded in state["rng"].items():
        random_state = torch.frombuffer(bytearray(base64.b64decode(encoded)), dtype=torch.uint8)
        if kind == "cpu":
            torch.set_rng_state(random_state)
        elif kind == model.device.type:
            torch.get_device_module(model.device).set_rng_state(random_state)
    return int(state["step"])


def _load_optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, torch.Tensor], scalars: dict[str, Any]
) -> None:
    """Set states directly: `Optimizer.load_state_dict` would cast them to the parameter's dtype."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    saved: dict[str, dict[str, Any]] = {}
    for full_name, value in (tensors | scalars).items():
        name, key = full_name.rsplit(".", 1)
        saved.setdefault(name, {})[key] = value
    for group_number, group in enumerate(optimizer.param_groups):
        for number, parameter in enumerate(group["params"]):
            if hasattr(optimizer, "init_state"):  # bitsandbytes allocates its buffers, paged ones too, itself
                optimizer.init_state(group, parameter, group_number, number)
            state = optimizer.state[parameter]
            for key, value in saved.get(names[id(parameter)], {}).items():
                if isinstance(state.get(key), torch.Tensor):
                    state[key].copy_(value)
                else:
                    state[key] = value.to(parameter.device) if isinstance(value, torch.Tensor) else value


# ---------------------------------------------------------------------------------------------- the disk

# What the contract lets a run write, and therefore lets --overwrite_output_dir remove.
_OWN_FILES = (
    "config.json generation_config.json model.safetensors model-*-of-*.safetensors model.safetensors.index.json "
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt "
    "tokenizer.model chat_template.jinja README.md log.jsonl memory.json loss.png memory.png config.yaml "
    "train_results.json"
).split()


def prepare_output_dir(config: Config, calendar: Calendar, model: nn.Module) -> None:
    """Make the output folder; remove an earlier run's files if asked to; check that this run's will fit.

    Called when all else has been loaded, so that no mistake costs the earlier run.

    Args:
        config: `output_dir`, `overwrite_output_dir` and the saving options count.
        calendar: tells how many checkpoints there will be.
        model: its size, and the optimizer's with it.

    Raises:
        DiskError: the disk has less room than the run will need.
    """
    output_dir = Path(str(config.output_dir))
    output_dir.mkdir(parents=True, exist_ok=True)
    resumes = config.resume_from_checkpoint is not None
    old_files = [] if resumes else [file for pattern in _OWN_FILES for file in output_dir.glob(pattern)]
    old_checkpoints = [] if resumes else [f for f in list_checkpoints(output_dir) if (f / MANIFEST).is_file()]
    _require_space(config, calendar, model, old_files + [f for folder in old_checkpoints for f in folder.iterdir()])
    for file in old_files:
        file.unlink()
    for folder in old_checkpoints:
        delete_checkpoint(folder)


def _require_space(config: Config, calendar: Calendar, model: nn.Module, replaced: list[Path]) -> None:
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    kept = calendar.num_checkpoints
    if config.save_total_limit is not None:
        kept = min(kept, config.save_total_limit + 1)  # an old one goes when the new one is complete
    needed = weights + kept * (weights + estimate_state_bytes(config, model))
    output_dir = Path(str(config.output_dir))
    free = shutil.disk_usage(output_dir).free + sum(file.stat().st_size for file in replaced)
    if config.resume_from_checkpoint is not None:
        free += sum(f.stat().st_size for folder in list_checkpoints(output_dir) for f in folder.iterdir())
    if needed > free:
        raise DiskError(
            f"{output_dir} has {free / 1e9:.1f} GB free, and the final model and {kept} checkpoints need "
            f"{needed / 1e9:.1f} GB\nfree some space, choose another --output_dir, or keep fewer with "
            "--save_total_limit 1 or --save_strategy no"
        )
