"""Several ranks write what one process writes, byte for byte, and agree on all that is chosen."""

import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import bf16_model, make_config
from ranks import run_on_ranks
from sharded import HYBRID, odd_model, on_ranks, shard_plainly
from small_runs import OUT, contents
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import fullft.saving.best
import fullft.saving.checkpoint
import fullft.saving.files
import fullft.saving.output_dir
import fullft.saving.resuming
import fullft.saving.tensors
import fullft.saving.weights
from fullft.config.steps import Steps
from fullft.errors import DiskError
from fullft.saving.best import BestCheckpoint
from fullft.saving.checkpoint import Checkpoint
from fullft.saving.export import check_export, export_model
from fullft.saving.output_dir import EarlierRun, prepare_output_dir, recover
from fullft.saving.tensors import writes
from fullft.saving.weights import save_weights
from fullft.storage.tiers import first_element

# ---------------------------------------------------------------------------------------------- weights


def weights_of(family: str) -> PreTrainedModel:
    return odd_model(tied=family == "tied") if family in ("untied", "tied") else bf16_model(family)


@pytest.mark.parametrize("shape", [(2,), (3,), (4,), (2, 1), HYBRID], ids=str)
@pytest.mark.parametrize("family", ["untied", "tied", "gpt2", "mixtral"])
def test_weights_of_any_ranks_are_the_same_files(
    family: str, shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several files, tied weights, experts that must be converted back, ranks without rows of some tensors."""
    monkeypatch.setattr(fullft.saving.weights, "MAX_SHARD_SIZE", "30KB")
    model = weights_of(family)

    def save() -> dict[str, str]:
        shard_plainly(model, shape)
        return save_weights(model, tmp_path / "many")

    for folder in ("one", "many"):
        (tmp_path / folder).mkdir()
    digests = save_weights(model, tmp_path / "one")
    assert on_ranks(shape, save) == [digests] * math.prod(shape)
    assert contents(tmp_path / "many") == contents(tmp_path / "one") and len(digests) > 1


@pytest.mark.parametrize("block", [4096, 1 << 24])
def test_large_stretches_are_written_whole(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the page cache, in blocks that begin at pages of the file."""
    monkeypatch.setattr(fullft.saving.tensors, "_BLOCK", block)
    model = odd_model(hidden_size=248)

    def save() -> None:
        shard_plainly(model, (3,))
        save_weights(model, tmp_path / "many")

    for folder in ("one", "many"):
        (tmp_path / folder).mkdir()
    save_weights(model, tmp_path / "one")
    run_on_ranks(3, save)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


@pytest.mark.parametrize("mistake", ["shifted rows", "a rank that writes nothing"])
def test_rows_in_the_wrong_place_change_the_files(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control."""
    model = odd_model()

    def first(tensor: torch.Tensor) -> int:
        return max(0, first_element(tensor) - 1) if mistake == "shifted rows" else first_element(tensor)

    def is_writer(tensor: torch.Tensor) -> bool:
        return writes(tensor) and (mistake == "shifted rows" or dist.get_rank() == 0)

    def save() -> dict[str, str]:
        shard_plainly(model, (2,))
        monkeypatch.setattr(fullft.saving.tensors, "first_element", first)
        monkeypatch.setattr(fullft.saving.tensors, "writes", is_writer)
        return save_weights(model, tmp_path / "many")

    for folder in ("one", "many"):
        (tmp_path / folder).mkdir()
    digests = save_weights(model, tmp_path / "one")
    assert run_on_ranks(2, save)[0] != digests
    ours, theirs = (contents(tmp_path / folder)["model.safetensors"] for folder in ("many", "one"))
    assert ours != theirs and len(ours) == len(theirs)


# ---------------------------------------------------------------------------------------------- the final model


def test_the_exported_model_is_the_same_and_is_checked(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(folder: str, shape: tuple[int, ...]) -> list[str]:
        model = odd_model()
        shard_plainly(model, shape)
        config = make_config(output_dir=tmp_path / folder)
        export_model(config, model, tokenizer, {"num_parameters": 9, "steps": 3})
        lines = [check_export(config, model, [1, 2, 3])]
        monkeypatch.setattr(fullft.saving.export, "available_host_bytes", lambda: 1_000 if is_first() else 2**40)
        return [*lines, check_export(config, model, [1, 2, 3])]

    def is_first() -> bool:
        return not dist.is_initialized() or dist.get_rank() == 0

    expected = export("run", (1,))
    one = contents(tmp_path / "run")
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "run")
    assert "the same logits" in expected[0] and "no memory for a second copy" in expected[1]
    first, second = run_on_ranks(2, export, "run", (2,))
    assert first == second and first[0] == expected[0]
    # Ranks need no second copy to compare what each of them has.
    assert "its files hold the trained weights, compared bit by bit" in first[1]
    assert contents(tmp_path / "run") == one


def test_another_model_in_the_folder_is_noticed(tmp_path: Path) -> None:
    """The negative control: logits differ, and without a second copy one rank's rows."""

    def check() -> list[str]:
        model = odd_model()
        shard_plainly(model, (2,))
        save_weights(model, tmp_path)
        with torch.no_grad():
            model.model.norm.weight.mul_(1.5)
        config = make_config(output_dir=tmp_path)
        lines = [check_export(config, model, [1, 2, 3])]
        fullft.saving.export.available_host_bytes = lambda: 1_000
        return [*lines, check_export(config, model, [1, 2, 3])]

    first, second = run_on_ranks(2, check)
    assert first == second and "warning: its logits differ by up to" in first[0]
    assert "warning: its files do not hold the trained weights" in first[1]


def test_ranks_choose_the_same_best_checkpoint(tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if some see the folder as it was before."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    reloaded: list[str] = []

    def choose() -> list[Any]:
        monkeypatch.setattr(fullft.saving.best, "reload_weights", lambda *arguments: reloaded.append(arguments[2].name))
        if dist.get_rank() == 1:
            for name in ("own_checkpoints", "manifest_names"):
                monkeypatch.setattr(fullft.saving.best, name, lambda _: [])
        config = make_config(output_dir=tmp_path, load_best_model_at_end=True)
        model = odd_model()
        noted = {"checkpoint": "checkpoint-1", "step": 1, "eval_loss": 2.0}
        best = BestCheckpoint(config, Checkpoint(tmp_path / "checkpoint-2", {"best": noted}))
        losses = {1: 2.0, 2: 2.25}
        return [best.including(3, losses), best.load(model, 2, losses), *reloaded]

    first, second = run_on_ranks(2, choose)
    assert first == second and first[0]["step"] == first[1].step == 1 and first[2:] == ["checkpoint-1"]


# ---------------------------------------------------------------------------------------------- the output folder


def test_the_first_rank_sets_the_earlier_run_aside(earlier: dict[str, bytes]) -> None:
    def fail() -> list[str]:
        config = make_config(output_dir=OUT, overwrite_output_dir=True)
        earlier = prepare_output_dir(config, Steps(config, 9), odd_model())
        dist.barrier()
        seen = os.listdir(OUT)
        dist.barrier()
        with pytest.raises(ValueError, match="no number"), earlier:
            raise ValueError("no number")
        return [type(earlier).__name__, *seen]

    assert run_on_ranks(2, fail) == [[EarlierRun.__name__, ".replaced"], ["nullcontext", ".replaced"]]
    assert contents(OUT) == earlier


def test_a_folder_that_ranks_do_not_share_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare() -> None:
        monkeypatch.setattr(fullft.saving.output_dir, "_LATEST", 0.2)
        os.chdir(tmp_path / str(dist.get_rank()))
        config = make_config(output_dir=Path("out"))
        prepare_output_dir(config, Steps(config, 9), odd_model())

    for machine in ("0", "1"):
        (tmp_path / machine).mkdir()
    with pytest.raises(DiskError, match="out: choose an --output_dir on a file system that all machines share"):
        run_on_ranks(2, prepare)
    assert contents(tmp_path) == {}
    (tmp_path / "0" / "out" / ".shared-0af.tmp").touch()  # of a run that was killed then
    recover(tmp_path / "0" / "out")
    assert contents(tmp_path) == {}
