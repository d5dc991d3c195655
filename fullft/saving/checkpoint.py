"""Checkpoints: saved so that no crash leaves half of one, verified before they are trusted, resumed to the bit.

There is no pickle in one: tensors are in safetensors, the rest is JSON. `output_dir.py` installs a whole folder at
once, `files.py` writes a whole file at once.
"""

import base64
import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fullft.config.config import Config, to_words
from fullft.config.declare import by_name
from fullft.config.numerics import Format, Numerics
from fullft.config.options import NEWEST, UNDECIDED, Options
from fullft.config.steps import Steps
from fullft.errors import CheckpointError, OptionsError
from fullft.optim.adamw import AdamW
from fullft.saving.files import staged_folder, sync_folder, write_tensors
from fullft.saving.output_dir import (
    MANIFEST,
    delete_checkpoint,
    discard_earlier_run,
    install_checkpoint,
    list_checkpoints,
    own_checkpoints,
    recover,
    step_of,
)
from fullft.saving.weights import save_weights
from fullft.storage.tiers import Array, fill
from fullft.transforms.activation_checkpointing import recomputation_of

STATE = "trainer_state.json"
OPTIMIZER = "optimizer.safetensors"
_HASH_CHUNK = 1 << 24  # bytes


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

    Args:
        config: `output_dir` and `save_total_limit` are read. All options are saved, to be compared on resume.
        steps: says which epoch it is, and where in it.
        step: the last finished step.
        model: saved as `save_pretrained` does.
        tokenizer: saved next to it, so that the folder is a usable model.
        optimizer: its states go into `optimizer.safetensors`.
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
        "rng": _random_states(model.device),
        "optimizer": _step_counts(optimizer, model),
        "options": to_words(config),
        "best": best,
    }
    with staged_folder(folder) as staging:
        hashes = save_weights(model, staging)
        hashes[OPTIMIZER] = write_tensors(staging / OPTIMIZER, _optimizer_state(optimizer, model))
        tokenizer.save_pretrained(staging)
        (staging / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        files = {str(path.relative_to(staging)): path for path in sorted(staging.rglob("*")) if path.is_file()}
        hashes |= {name: _sha256(file) for name, file in files.items() if name not in hashes}  # of small ones
        (staging / MANIFEST).write_text(json.dumps({"sha256": hashes}, indent=1), encoding="utf-8")
        sync_folder(staging)
        install_checkpoint(staging, folder)
    discard_earlier_run(folder.parent)
    for old in _surplus(config, step, best):
        delete_checkpoint(old)
    return folder


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


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:  # read, not mapped: a truncated map ends the process with SIGBUS
        while chunk := content.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _optimizer_state(optimizer: AdamW, model: nn.Module) -> dict[str, Array]:
    """Collect states as `<parameter>.<state>`, wherever they live."""
    return {
        f"{name}.{key}": array
        for name, parameter in model.named_parameters()
        for key, array in optimizer.states_of(parameter).items()
    }


def _step_counts(optimizer: AdamW, model: nn.Module) -> dict[str, Any]:
    """Return how many steps there were, and for each parameter how many of them it has missed, if any."""
    missed = {
        name: optimizer.missed[id(parameter)]
        for name, parameter in model.named_parameters()
        if id(parameter) in optimizer.missed
    }
    return {"num_steps": optimizer.num_steps, "missed": missed}


def _random_states(device: torch.device) -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return {kind: base64.b64encode(state.numpy().tobytes()).decode() for kind, state in states.items()}


# ---------------------------------------------------------------------------------------------- finding


def open_checkpoint(config: Config) -> Checkpoint | None:
    """Find and verify the checkpoint to resume from.

    Args:
        config: `resume_from_checkpoint`, `output_dir` and `allow_changes` are read.

    Returns:
        None when the run does not resume one.

    Raises:
        CheckpointError: it is missing or damaged; a bare flag passes over damaged ones to the newest good one.
        OptionsError: it was made with other options, and `--allow_changes` is not given.
    """
    if config.resume_from_checkpoint is None:
        return None
    recover(config.output_dir)
    if config.resume_from_checkpoint != NEWEST:
        checkpoint = verify(Path(config.resume_from_checkpoint))
    else:
        checkpoint = _newest_good(config.output_dir)
    _require_same_options(config, checkpoint)
    return checkpoint


def _require_same_options(config: Config, checkpoint: Checkpoint) -> None:
    if not config.allow_changes and (changed := _changed_options(config, checkpoint.state["options"])):
        raise OptionsError(
            f"{checkpoint.folder} was made with other options: {'; '.join(changed)}\n"
            "restore them, or pass --allow_changes"
        )


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
    hashes = _read_json(folder / MANIFEST).get("sha256")
    if not isinstance(hashes, dict):
        raise CheckpointError(f"{folder} is no checkpoint of this program: its {MANIFEST} lists no sha256")
    for name, written in hashes.items():
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
    now = to_words(config)
    fixed = [name for name, option in by_name(Options).items() if not option.metadata["may_change"]]
    if config.compiles:  # graphs that recompute something else may round otherwise
        decisive = ("activation_checkpointing", "offload")
        before = dataclasses.replace(config, **{name: saved[name] for name in decisive})
        fixed += decisive if recomputation_of(config) != recomputation_of(before) else ()
    # What is still at auto is compared when it has been chosen.
    return [
        f"{name} was {saved.get(name)}, is {now[name]}"
        for name in fixed
        if now[name] not in (saved.get(name), UNDECIDED)
    ]


# ---------------------------------------------------------------------------------------------- resuming


def restore(
    checkpoint: Checkpoint | None,
    config: Config,
    steps: Steps,
    model: PreTrainedModel,
    optimizer: AdamW,
    data_fingerprint: str,
) -> int:
    """Restore optimizer and random states. The weights are there already: the model was loaded from the checkpoint.

    Our own checkpoints of later steps are deleted: they belong to a trajectory that this run leaves, and the next bare
    `--resume_from_checkpoint` must not return to it.

    Args:
        checkpoint: None starts afresh.
        config: `output_dir`, the number formats, the batch size and `allow_changes` are read.
        steps: of the whole run.
        model: on its device.
        optimizer: filled in place, every state in the dtype that it was saved in.
        data_fingerprint: of the rows as they are now.

    Returns:
        The last finished step; 0 for a new run.

    Raises:
        CheckpointError: the data or the optimizer is not the one that the checkpoint was made with.
        OptionsError: what was left at auto has been chosen otherwise, or the run would end before the checkpoint.
    """
    if checkpoint is None:
        return 0
    _require_same_options(config, checkpoint)
    state = checkpoint.state
    _require_steps_enough(steps, checkpoint)
    if state["data"]["fingerprint"] != data_fingerprint and not config.allow_changes:
        raise CheckpointError(
            f"the data has changed since {checkpoint.folder} was saved: restore it, or pass --allow_changes"
        )
    saved = state["options"]
    if saved["optim"] != config.optim:
        raise CheckpointError(
            f"{checkpoint.folder} holds states of --optim {saved['optim']}: pass --optim {saved['optim']}"
        )
    masters = saved.get("master_weights", "none")
    before = Numerics.of(saved["precision"], masters, saved["optim"], config.accumulates)
    if config.numerics.weights is Format.BF16 and masters != config.master_weights:
        raise CheckpointError(f"{checkpoint.folder} holds other master weights: pass --master_weights {masters}")
    if before.weights is not config.numerics.weights:
        raise CheckpointError(
            f"{checkpoint.folder} holds weights of another format: pass --precision {saved['precision']}"
        )
    if saved["global_batch_size"] != config.global_batch_size:
        print(
            f"note: the first {state['step']} steps took {saved['global_batch_size']} sequences each, now it is "
            f"{config.global_batch_size}: in this epoch some rows may repeat, others be left out"
        )
    optimizer.num_steps = int(state["optimizer"]["num_steps"])
    parameters = dict(model.named_parameters())
    optimizer.missed = {id(parameters[name]): count for name, count in state["optimizer"].get("missed", {}).items()}
    _load_optimizer_states(optimizer, model, checkpoint.folder / OPTIMIZER)
    for kind, encoded in state["rng"].items():
        random_state = torch.frombuffer(bytearray(base64.b64decode(encoded)), dtype=torch.uint8)
        if kind == "cpu":
            torch.set_rng_state(random_state)
        elif kind == model.device.type:
            torch.get_device_module(model.device).set_rng_state(random_state)
    _leave_later_checkpoints(config.output_dir, state["step"])
    return int(state["step"])


def _require_steps_enough(steps: Steps, checkpoint: Checkpoint) -> None:
    done = checkpoint.state["step"]
    if done > steps.total:
        length = "max_steps" if steps.config.max_steps > 0 else "num_train_epochs"
        raise OptionsError(
            f"{checkpoint.folder} has done {done} steps, and this run is to end after {steps.total}: raise --{length}, "
            "or resume an earlier checkpoint"
        )


def _leave_later_checkpoints(output_dir: Path, step: int) -> None:
    """Delete our own checkpoints above a step, the latest first."""
    later = [folder for folder in own_checkpoints(output_dir) if step_of(folder) > step]
    if later:
        print(f"Continuing from step {step}: deleting what was saved after it, {', '.join(f.name for f in later)}")
    for folder in later:
        delete_checkpoint(folder)


def _load_optimizer_states(optimizer: AdamW, model: nn.Module, file: Path) -> None:
    """Fill the states, wherever they live, in the dtype that they were saved in.

    One tensor at a time: for 7B parameters the whole file would take 56 GB of host memory.
    """
    parameters = dict(model.named_parameters())
    with safe_open(file, framework="pt", device="cpu") as tensors:
        for full_name in tensors.keys():  # noqa: SIM118 (no mapping)
            name, key = full_name.rsplit(".", 1)
            fill(optimizer.states_of(parameters[name])[key], tensors.get_tensor(full_name))
