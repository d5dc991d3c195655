"""Resuming: the checkpoint to continue from, whether it may be continued, and what is restored of it.

On the same number of ranks a resumed run is the uninterrupted one to the bit; on another one up to the order of sums.
"""

import dataclasses
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from fullft.config.config import Config, to_words
from fullft.config.declare import by_name
from fullft.config.numerics import Format, Numerics
from fullft.config.options import NEWEST, Options
from fullft.config.steps import Steps
from fullft.errors import CheckpointError, OptionsError
from fullft.optim.adamw import AdamW, block_of
from fullft.ranks import by_first_rank
from fullft.saving.checkpoint import OPTIMIZER, Checkpoint, named_parameters, verify
from fullft.saving.output_dir import (
    delete_checkpoint,
    list_checkpoints,
    manifest_names,
    own_checkpoints,
    recover,
    step_of,
)
from fullft.storage.tiers import fill, first_element
from fullft.transforms.activation_checkpointing import recomputation_of

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
    by_first_rank(lambda: recover(config.output_dir))
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
    for folder in by_first_rank(lambda: list_checkpoints(output_dir)):
        try:
            return verify(folder)
        except CheckpointError as error:
            print(f"warning: passing over {error}")
    raise CheckpointError(f"{output_dir} has no good checkpoint: start without --resume_from_checkpoint")


def _changed_options(config: Config, saved: dict[str, Any]) -> list[str]:
    now = to_words(config)
    fixed = [name for name, option in by_name(Options).items() if not option.metadata["may_change"]]
    if (saved.get("gpus") or 1) != config.gpus:  # other ranks have other shares of the same global batch
        fixed.remove("gradient_accumulation_steps")
    if config.compiles:  # graphs that recompute something else may round otherwise
        decisive = ("activation_checkpointing", "offload")
        before = dataclasses.replace(config, **{name: saved[name] for name in decisive})
        fixed += decisive if recomputation_of(config) != recomputation_of(before) else ()
    # What is still at auto is compared when it has been chosen.
    return [
        f"{name} was {saved.get(name)}, is {now[name]}"
        for name in fixed
        if name not in config.undecided and now[name] != saved.get(name)
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
    """Restore the optimizer. The weights are there already: the model was loaded from the checkpoint.

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
    before = Numerics.of(saved["precision"], masters, saved["optim"], config.adds_gradients)
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
    parameters = named_parameters(optimizer, model)
    optimizer.missed = {id(parameters[name]): count for name, count in state["optimizer"].get("missed", {}).items()}
    _load_states(optimizer, parameters, checkpoint.folder)
    by_first_rank(lambda: _leave_later_checkpoints(config.output_dir, state["step"]))
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


def _load_states(optimizer: AdamW, parameters: dict[str, nn.Parameter], folder: Path) -> None:
    """Fill the states, wherever they live, in the dtype that they were saved in; a rank reads its rows alone.

    One tensor at a time: for 7B parameters the whole of them would take 56 GB of host memory.
    """
    for file in manifest_names(folder):
        if fnmatch(file, OPTIMIZER.format(suffix="*")):
            with safe_open(folder / file, framework="pt", device="cpu") as tensors:
                for full_name in tensors.keys():  # noqa: SIM118 (no mapping)
                    name, key = full_name.rsplit(".", 1)
                    array = optimizer.states_of(parameters[name])[key]
                    first = first_element(parameters[name]) // block_of(key)
                    fill(array, tensors.get_slice(full_name)[first : first + array.numel()])
