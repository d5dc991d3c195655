"""The output folder: which files are a run's own, whether there is room, and what becomes of an earlier run's.

Nothing that a run has not written is ever deleted, moved or overwritten. A killed run is recovered from here.
"""

import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from torch import nn

from fullft.config.config import Config
from fullft.config.ranks import find_place
from fullft.config.steps import Steps
from fullft.errors import DiskError
from fullft.optim.build import estimate_state_bytes
from fullft.ranks import by_each_rank, by_first_rank, is_first
from fullft.saving.files import sync

MANIFEST = "manifest.json"  # it makes a folder `checkpoint-<step>` ours, and lists the files that we wrote there
SNAPSHOT = "memory_snapshot.pickle"  # torch's own format, for https://pytorch.org/memory_viz

_DIGITS = "[0-9]" * 5
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", f"model-{_DIGITS}-of-{_DIGITS}.safetensors")
# What the contract lets a run write at the root, and therefore lets --overwrite_output_dir replace.
OWN_FILES = (
    *WEIGHT_FILES,
    *(
        "config.json generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json "
        "added_tokens.json vocab.json merges.txt tokenizer.model chat_template.jinja additional_chat_templates/*.jinja "
        "README.md log.jsonl memory.json loss.png memory.png config.yaml train_results.json"
    ).split(),
    SNAPSHOT,
)

# An earlier run's files, while the run that replaces it has saved nothing. The first name is used while they are moved
# there or back, so that after a kill it is known which of the files at the root belong to which run.
_MOVING, _REPLACED = ".replacing", ".replaced"
_FAILED = ".failed-run"  # the records of the run that was to replace it
_LATEST = 90.0  # seconds. Source: nfs(5), acdirmax: what a folder holds may be known from a minute ago
_STALE = re.compile(r"\.(checkpoint-\d+|export|config\.yaml|log\.jsonl|shared-\w+)\.tmp")
_RETIRED = re.compile(r"\.(checkpoint-\d+)\.old")


# ---------------------------------------------------------------------------------------------- checkpoints by name


def list_checkpoints(output_dir: Path) -> list[Path]:
    """List all `checkpoint-<step>` folders, the newest step first."""
    folders = output_dir.glob("checkpoint-*") if output_dir.is_dir() else []
    named = [folder for folder in folders if re.fullmatch(r"checkpoint-\d+", folder.name) and folder.is_dir()]
    return sorted(named, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """Read the step from a checkpoint's name."""
    return int(folder.name.removeprefix("checkpoint-"))


def own_checkpoints(output_dir: Path) -> list[Path]:
    """List the checkpoints that runs of this program made, the newest step first."""
    return [folder for folder in list_checkpoints(output_dir) if manifest_names(folder)]


def manifest_names(folder: Path) -> list[str]:
    """List the files that we wrote into a checkpoint, the manifest last; none if it is not ours."""
    try:
        hashes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        # A manifest from elsewhere must not reach files outside of its folder.
        names = [name for name in hashes.keys() if not Path(name).is_absolute() and ".." not in Path(name).parts]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return [*names, MANIFEST]


def delete_checkpoint(folder: Path) -> None:
    """Delete the files that a checkpoint's manifest lists, and the folder if nothing else is there."""
    names = manifest_names(folder)
    for name in names:
        (folder / name).unlink(missing_ok=True)
    _remove_emptied(folder.parent, [folder / name for name in names])


def install_checkpoint(staging: Path, target: Path) -> None:
    """Rename a complete checkpoint to its final name.

    Args:
        staging: its files, all on disk.
        target: what is there already is replaced if it is ours, and kept if it is not.
    """
    if not target.exists():
        staging.rename(target)
        sync(target.parent)
        return
    retired = target.parent / f".{target.name}.old"
    target.rename(retired)
    staging.rename(target)
    sync(target.parent)
    _dissolve(retired, target)


def _dissolve(retired: Path, target: Path) -> None:
    """Delete a replaced checkpoint; foreign files in it move to its successor, or next to it."""
    delete_checkpoint(retired)
    if not retired.exists():
        return
    for path in list(retired.iterdir()):
        if not (target / path.name).exists():
            path.rename(target / path.name)
    if not any(retired.iterdir()):
        retired.rmdir()
        return
    kept, number = target.parent / f"{target.name}.old", 1
    while kept.exists():
        number += 1
        kept = target.parent / f"{target.name}.old{number}"
    retired.rename(kept)
    print(f"warning: files in {target} that are not this run's are now in {kept}")


# ---------------------------------------------------------------------------------------------- the folder of a run


class EarlierRun:
    """The run that `--overwrite_output_dir` replaces. A context manager: a run that fails early puts it back.

    It is deleted as soon as the new run has a checkpoint or its final model: see `discard_earlier_run`.

    Args:
        output_dir: where the earlier run, if there was one, has been set aside.
    """

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir

    def __enter__(self) -> "EarlierRun":
        """Do nothing: the files are set aside already."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Put the earlier run back if this one has failed before it saved anything."""
        if kind is not None:
            try:
                _settle(self.output_dir)
            except OSError as error:  # must not hide why the run failed
                print(f"warning: the earlier run is still in {self.output_dir}, not put back: {error}")


def prepare_output_dir(config: Config, steps: Steps, model: nn.Module) -> AbstractContextManager[object]:
    """Make the output folder; check that this run's files will fit; set an earlier run's files aside.

    Called when all else has been loaded, so that most mistakes show before anything moves. The first rank does it all.

    Args:
        config: `output_dir`, `resume_from_checkpoint` and the saving options are read.
        steps: says how many checkpoints there will be.
        model: its size, and the optimizer's, are estimated.

    Returns:
        A context manager for the loop: an `EarlierRun` on the first rank, on others one that does nothing.

    Raises:
        DiskError: the disk has less room than the run will need, or some ranks do not see the folder.
    """
    by_first_rank(lambda: _prepare(config, steps, model))
    _require_shared(config.output_dir)
    return EarlierRun(config.output_dir) if is_first() else nullcontext()


def _require_shared(folder: Path) -> None:
    """Check that all ranks see what the first one writes: each is to write its part of every checkpoint there."""
    if find_place().count == 1:
        return
    mark = folder / by_first_rank(lambda: f".shared-{uuid.uuid4().hex}.tmp")
    by_first_rank(mark.touch)
    try:
        if not all(by_each_rank(lambda: _appears(mark))):
            raise DiskError(
                f"not all ranks see what the first one writes to {folder}: choose an --output_dir on a file system "
                "that all machines share"
            )
    finally:
        if is_first():
            mark.unlink()


def _appears(file: Path) -> bool:
    """Return whether a file is there, or comes: a network file system may show it late."""
    deadline = time.monotonic() + _LATEST
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _prepare(config: Config, steps: Steps, model: nn.Module) -> None:
    output_dir = config.output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    recover(output_dir)
    shutil.rmtree(output_dir / _FAILED, ignore_errors=True)
    _require_space(config, steps, model)
    if config.resume_from_checkpoint is None and (own := _own_files(output_dir)):
        _move(own, output_dir, output_dir / _MOVING)
        (output_dir / _MOVING).rename(output_dir / _REPLACED)


def discard_earlier_run(output_dir: Path) -> None:
    """Delete the run that has been set aside: its successor has a checkpoint or a final model."""
    # A failure here is no reason to end a run: the next start deletes what is left.
    shutil.rmtree(output_dir / _REPLACED, ignore_errors=True)


def recover(output_dir: Path) -> None:
    """Clean up after a killed run: half-written folders, and folders half replaced.

    Args:
        output_dir: may be missing.
    """
    for path in list(output_dir.iterdir()) if output_dir.is_dir() else []:
        if _STALE.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif match := _RETIRED.fullmatch(path.name):
            target = output_dir / match[1]
            if target.exists():
                _dissolve(path, target)
            else:
                path.rename(target)
    _settle(output_dir)


def _settle(output_dir: Path) -> None:
    """Keep either the run that was set aside or the one that was to replace it."""
    moving, replaced = output_dir / _MOVING, output_dir / _REPLACED
    # A checkpoint to continue from, or the final model, whose config comes last: at the root they are the new run's,
    # since the earlier one's have all been moved.
    if replaced.is_dir() and (own_checkpoints(output_dir) or (output_dir / "config.json").exists()):
        return discard_earlier_run(output_dir)
    if replaced.is_dir():
        shutil.rmtree(output_dir / _FAILED, ignore_errors=True)
        _move(_own_files(output_dir), output_dir, output_dir / _FAILED)
        replaced.rename(moving)
        kept = f"; the failed one's records are in {output_dir / _FAILED}" if (output_dir / _FAILED).exists() else ""
        print(f"The earlier run's files are back in {output_dir}{kept}")
    if moving.is_dir():
        files = [path for path in moving.rglob("*") if path.is_symlink() or not path.is_dir()]
        _move([file.relative_to(moving) for file in files], moving, output_dir)
        shutil.rmtree(moving)


def _own_files(output_dir: Path) -> list[Path]:
    """List a run's own files, relative to the folder."""
    files = [file for pattern in OWN_FILES for file in output_dir.glob(pattern) if not file.is_dir()]
    return [file.relative_to(output_dir) for file in files] + _checkpoint_files(output_dir)


def _checkpoint_files(output_dir: Path) -> list[Path]:
    """List the files of our own checkpoints, relative to the folder."""
    files = [folder / name for folder in own_checkpoints(output_dir) for name in manifest_names(folder)]
    return [file.relative_to(output_dir) for file in files if file.is_file()]


def _move(files: Iterable[Path], source: Path, target: Path) -> None:
    """Move files, given relative to both folders, and drop folders that this empties."""
    files = list(files)
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / file, target / file)
    _remove_emptied(source, [source / file for file in files])
    for folder in (source, target):
        if folder.is_dir():
            sync(folder)


def _remove_emptied(root: Path, files: Iterable[Path]) -> None:
    """Remove the folders below `root` in which these files were the last ones."""
    folders = {folder for file in files for folder in file.parents if root in folder.parents}
    for folder in sorted(folders, reverse=True):  # inner ones first
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _require_space(config: Config, steps: Steps, model: nn.Module) -> None:
    output_dir, resumes = config.output_dir, config.resume_from_checkpoint is not None
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    checkpoint = weights + estimate_state_bytes(model, config.numerics)
    saved = steps.num_checkpoints
    limit = saved if config.save_total_limit is None else config.save_total_limit
    kept = min(saved, max(limit, 2) if config.load_best_model_at_end else limit)  # the newest and the best one
    # At one moment there is one more: the next checkpoint, written before an old one goes, or the final model.
    needed = kept * checkpoint + (checkpoint if saved > kept else weights)
    free = shutil.disk_usage(output_dir).free
    # A resumed run's checkpoints are among those needed; all that an overwritten one has will go.
    own_files = _checkpoint_files(output_dir) if resumes else _own_files(output_dir)
    own = sum((output_dir / file).stat().st_size for file in own_files)
    if needed > free + own:
        raise DiskError(
            f"{output_dir} has {(free + own) / 1e9:.1f} GB free, and the final model and {kept} checkpoints need "
            f"{needed / 1e9:.1f} GB\nfree some space, choose another --output_dir, or keep fewer with "
            "--save_total_limit 1 or --save_strategy no"
        )
    first = checkpoint if saved else weights
    if not resumes and own and first > free:
        raise DiskError(
            f"{output_dir} has {free / 1e9:.1f} GB free besides the earlier run's files, which stay until the first "
            f"{'checkpoint' if saved else 'model'} of {first / 1e9:.1f} GB is complete\n"
            "delete the earlier run, free some space, or choose another --output_dir"
        )
