"""Checkpoints of several ranks: the same files for any number of them, read by any number."""

import errno
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import make_config, optimizer_of
from ranks import run_on_ranks
from safetensors import safe_open
from sharded import HYBRID, odd_model, on_ranks, shard_plainly
from small_runs import contents
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import fullft.saving.best
import fullft.saving.checkpoint
import fullft.saving.files
import fullft.saving.output_dir
import fullft.saving.resuming
import fullft.saving.tensors
import fullft.saving.weights
from fullft.config.config import Config
from fullft.config.steps import Steps
from fullft.errors import CheckpointError, OptionsError
from fullft.optim.adamw import AdamW, block_of
from fullft.saving.checkpoint import save_checkpoint, verify
from fullft.saving.resuming import _changed_options, open_checkpoint, restore
from fullft.storage.disk import DiskArray
from fullft.storage.tiers import fill, first_element, host_pieces, local_of

# ---------------------------------------------------------------------------------------------- checkpoints


def whole_state(name: str, length: int, dtype: torch.dtype) -> torch.Tensor:
    """What a state holds in all tests: numbers that depend on its name."""
    generator = torch.Generator().manual_seed(sum(name.encode()) * 1009)
    numbers = torch.randint(0, 256 if dtype == torch.uint8 else 2**15, (length,), generator=generator)
    return numbers.to(dtype)


def states_of(optimizer: AdamW, model: nn.Module) -> dict[str, tuple[Any, torch.Tensor]]:
    """Every state of a rank, by name, with what it is to hold."""
    found = {}
    for name, parameter in model.named_parameters():
        for key, array in optimizer.states_of(parameter).items():
            length, first = -(-parameter.numel() // block_of(key)), first_element(parameter) // block_of(key)
            whole = whole_state(f"{name}.{key}", length, array.dtype)
            found[f"{name}.{key}"] = (array, whole[first : first + array.numel()])
    return found


def trained(config: Config, shape: tuple[int, ...], hidden_size: int = 48) -> tuple[PreTrainedModel, AdamW]:
    """A model with an optimizer that seems to have taken three steps."""
    model = odd_model(hidden_size=hidden_size)
    shard_plainly(model, shape)
    optimizer = optimizer_of(model, config)
    for array, values in states_of(optimizer, model).values():
        fill(array, values)
    optimizer.num_steps = 3
    optimizer.missed = {id(optimizer.parameters[1]): 2}
    return model, optimizer


def save(folder: Path, tokenizer: PreTrainedTokenizerBase, shape: tuple[int, ...], **options: Any) -> list[Path]:
    """Save the checkpoint of a step on ranks in some shape."""
    step, hidden_size = options.pop("step", 3), options.pop("hidden_size", 48)

    def save_on_rank() -> Path:
        config = make_config(output_dir=folder, **options)
        model, optimizer = trained(config, shape, hidden_size)
        return save_checkpoint(config, Steps(config, 9), step, model, tokenizer, optimizer, "rows")

    return on_ranks(shape, save_on_rank)


def without_ranks(state: bytes) -> dict[str, Any]:
    """What `trainer_state.json` says, but for how many ranks there were."""
    words = dict(json.loads(state))
    for option in ("gpus", "gradient_accumulation_steps", "output_dir"):
        del words["options"][option]
    return words


@pytest.mark.parametrize("shape", [(3,), (4,), HYBRID], ids=str)
@pytest.mark.parametrize("offload", ["none", "optimizer=disk"])
def test_checkpoints_of_any_ranks_are_the_same_files(
    offload: str, shape: tuple[int, ...], tmp_path: Path, tokenizer: PreTrainedTokenizerBase, small_chunks: int
) -> None:
    save(tmp_path / "one", tokenizer, (1,), offload=offload)
    assert save(tmp_path / "many", tokenizer, shape, offload=offload) == [
        tmp_path / "many" / "checkpoint-3"
    ] * math.prod(shape)
    one, many = (contents(tmp_path / folder / "checkpoint-3") for folder in ("one", "many"))
    states = [without_ranks(files.pop("trainer_state.json")) for files in (one, many)]
    assert states[0] == states[1] and len(states[0]["optimizer"]["missed"]) == 1 and "rng" not in states[0]
    assert (one.pop("manifest.json") == many.pop("manifest.json")) is False  # the options name the ranks
    assert one == many and "optimizer.safetensors" in one
    assert verify(tmp_path / "many" / "checkpoint-3").state["step"] == 3
    assert os.listdir(tmp_path / "many") == ["checkpoint-3"]


def test_8_bit_states_are_the_same_files(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Shards of large tensors begin at blocks; small ones have 32 bits."""
    options: dict[str, Any] = {"optim": "adamw_8bit", "hidden_size": 256}
    save(tmp_path / "one", tokenizer, (1,), **options)
    save(tmp_path / "many", tokenizer, (2,), **options)
    one, many = ((tmp_path / folder / "checkpoint-3" / "optimizer.safetensors") for folder in ("one", "many"))
    with safe_open(one, framework="pt") as tensors:
        assert any(name.endswith("_absmax") for name in tensors.keys())  # noqa: SIM118 (no mapping)
    assert one.read_bytes() == many.read_bytes()


def test_ranks_share_the_hashing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of files that one process writes, too: states come in several files if they are large."""
    for module in (fullft.saving.weights, fullft.saving.checkpoint):
        monkeypatch.setattr(module, "MAX_SHARD_SIZE", "60KB")
    hashed: list[str] = []
    of_file = fullft.saving.files.sha256
    monkeypatch.setattr(fullft.saving.files, "sha256", lambda file: hashed.append(file.name) or of_file(file))

    def save_and_verify() -> tuple[list[str], list[str]]:
        config = make_config(output_dir=tmp_path)
        model, optimizer = trained(config, (2,))
        folder = save_checkpoint(config, Steps(config, 9), 3, model, tokenizer, optimizer, "rows")
        saved = [*hashed]
        hashed.clear()
        verify(folder)
        return saved, [*hashed]

    saved, verified = zip(*run_on_ranks(2, save_and_verify), strict=True)
    names = set(contents(tmp_path / "checkpoint-3")) - {"manifest.json"}
    tensors = {name for name in names if name.endswith(".safetensors")}
    assert len([name for name in tensors if name.startswith("optimizer-")]) > 2
    for first, second in (saved, verified):
        assert set(first).isdisjoint(second) and abs(len(first) - len(second)) <= 2
    assert {*saved[0], *saved[1]} == tensors and {*verified[0], *verified[1]} == names
    verify(tmp_path / "checkpoint-3")


@pytest.mark.parametrize("failing", ["a full disk on one rank", "an error on the first rank", "too little space"])
def test_a_rank_that_cannot_write_fails_the_save(
    failing: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, tokenizer, (2,), step=2)
    before = contents(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def save_on_rank() -> tuple[str, int | None, list[str]]:
        config = make_config(output_dir=tmp_path, save_total_limit=1)
        model, optimizer = trained(config, (2,))
        if failing == "a full disk on one rank" and dist.get_rank() == 1:
            monkeypatch.setattr(fullft.saving.tensors, "_write_block", full)
        if failing == "an error on the first rank" and dist.get_rank() == 0:
            monkeypatch.setattr(fullft.saving.checkpoint, "install_checkpoint", full)
        if failing == "too little space":
            monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
        try:
            save_checkpoint(config, Steps(config, 9), 3, model, tokenizer, optimizer, "rows")
        except OSError as error:
            return type(error).__name__, error.errno, sorted(os.listdir(tmp_path)) if dist.get_rank() == 0 else []
        raise AssertionError("the checkpoint was saved")

    first, second = run_on_ranks(2, save_on_rank)
    assert first[:2] == second[:2] == ("OSError", errno.ENOSPC)
    assert first[2] == ["checkpoint-2"] and contents(tmp_path) == before


def test_gathered_weights_are_not_saved_with_fresh_states(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    def save_gathered() -> None:
        config = make_config(output_dir=tmp_path)
        model, optimizer = trained(config, (2,))
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.full_tensor())
        save_checkpoint(config, Steps(config, 9), 3, model, tokenizer, optimizer, "rows")

    with pytest.raises(KeyError):
        run_on_ranks(2, save_gathered)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- resuming


class Counting:
    """A file of tensors that counts the bytes that are asked of it."""

    def __init__(self, file: Path, **options: Any) -> None:
        self._file, self.read = safe_open(file, **options), 0

    def __enter__(self) -> "Counting":
        self._file.__enter__()
        return self

    def __exit__(self, *arguments: Any) -> None:
        self._file.__exit__(*arguments)

    def keys(self) -> list[str]:
        return list(self._file.keys())

    def get_slice(self, name: str) -> "Counting._Slice":
        return Counting._Slice(self, self._file.get_slice(name))

    class _Slice:
        def __init__(self, counting: "Counting", stored: Any) -> None:
            self._counting, self._stored = counting, stored

        def __getitem__(self, place: slice) -> torch.Tensor:
            values: torch.Tensor = self._stored[place]
            self._counting.read += values.nbytes
            return values


@pytest.mark.parametrize("shape", [(1,), (2,), (3,), (4,), HYBRID], ids=str)
def test_any_ranks_read_their_part_of_a_checkpoint(
    shape: tuple[int, ...], tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, tokenizer, (2,))
    files: list[Counting] = []

    def opened(*arguments: Any, **options: Any) -> Counting:
        files.append(Counting(*arguments, **options))
        return files[-1]

    def resume() -> tuple[int, int, dict[str, bool]]:
        monkeypatch.setattr(fullft.saving.resuming, "safe_open", opened)
        config = make_config(output_dir=tmp_path, resume_from_checkpoint="newest")
        model = odd_model()
        shard_plainly(model, shape)
        optimizer = optimizer_of(model, config)
        step = restore(open_checkpoint(config), config, Steps(config, 9), model, optimizer, "rows")
        assert optimizer.num_steps == 3 and optimizer.missed == {id(optimizer.parameters[1]): 2}
        equal = {
            name: torch.equal(local_of(array), values) for name, (array, values) in states_of(optimizer, model).items()
        }
        return step, sum(file.read for file in files), equal

    found = on_ranks(shape, resume)
    assert all(step == 3 and all(equal.values()) for step, _, equal in found)
    whole = (tmp_path / "checkpoint-3" / "optimizer.safetensors").stat().st_size - 10_000  # less the header
    copies, most = math.prod(shape[:-1]), math.ceil(101 / shape[-1]) / 101 * whole * 1.1
    assert all(read <= most for _, read, _ in found) and sum(read for _, read, _ in found) >= whole * copies
    files.clear()


def test_what_is_read_is_compared(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """The negative control: without the rank's place it gets the rows of the first one."""
    save(tmp_path, tokenizer, (2,))

    def resume() -> bool:
        fullft.saving.resuming.first_element = lambda _: 0  # type: ignore[attr-defined]  # in this process alone
        config = make_config(output_dir=tmp_path, resume_from_checkpoint="newest")
        model = odd_model()
        shard_plainly(model, (2,))
        optimizer = optimizer_of(model, config)
        restore(open_checkpoint(config), config, Steps(config, 9), model, optimizer, "rows")
        return all(torch.equal(array, values) for array, values in states_of(optimizer, model).values())

    assert run_on_ranks(2, resume) == [True, False]


def test_states_on_disk_are_restored(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, small_chunks: int) -> None:
    save(tmp_path, tokenizer, (3,))

    def resume() -> list[bool]:
        config = make_config(output_dir=tmp_path, resume_from_checkpoint="newest", offload="optimizer=disk")
        model = odd_model()
        shard_plainly(model, (2,))
        optimizer = optimizer_of(model, config)
        restore(open_checkpoint(config), config, Steps(config, 9), model, optimizer, "rows")
        states = states_of(optimizer, model).values()
        assert all(isinstance(array, DiskArray) for array, _ in states)
        return [torch.equal(torch.cat([piece.clone() for piece in host_pieces(a)]), values) for a, values in states]

    assert all(map(all, run_on_ranks(2, resume)))


def test_another_number_of_ranks_needs_no_leave(tmp_path: Path) -> None:
    config = make_config(output_dir=tmp_path, per_device_train_batch_size=1)
    saved = {**vars(config), "gpus": 2, "gradient_accumulation_steps": 8, "shard": "full"}
    assert _changed_options(config, saved) == []
    for alone in ({"gpus": 1}, {"gpus": None}):
        changed = _changed_options(config, saved | alone)
        assert changed == ["gradient_accumulation_steps was 8, is 16"]
    saved.pop("gpus")  # of an older version
    assert _changed_options(config, saved) == ["gradient_accumulation_steps was 8, is 16"]
    assert _changed_options(config, saved | {"gpus": 2, "seed": 1}) == ["seed was 1, is 42"]


def test_all_ranks_agree_on_the_checkpoint(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """One that is damaged is passed over, later ones are deleted once, and a refusal reaches all."""
    for step in (2, 3, 4):
        save(tmp_path, tokenizer, (2,), step=step)
    with (tmp_path / "checkpoint-4" / "optimizer.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")

    def resume() -> list[Any]:
        config = make_config(output_dir=tmp_path, resume_from_checkpoint="newest")
        checkpoint = open_checkpoint(config)
        assert checkpoint is not None
        found: list[Any] = [checkpoint.folder.name]
        for options in (
            {"resume_from_checkpoint": tmp_path / "checkpoint-4"},
            {"resume_from_checkpoint": tmp_path / "checkpoint-9"},
            {"resume_from_checkpoint": "newest", "seed": 1},
        ):
            try:
                open_checkpoint(make_config(output_dir=tmp_path, **options))
            except (CheckpointError, OptionsError) as error:
                found.append((type(error), str(error)))
        model, optimizer = trained(config, (2,))
        restore(checkpoint, config, Steps(config, 9), model, optimizer, "rows")
        return found

    first, second = run_on_ranks(2, resume)
    assert first == second and first[0] == "checkpoint-3"
    assert "optimizer.safetensors is damaged" in first[1][1] and "no checkpoint folder" in first[2][1]
    assert first[3][0] is OptionsError
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "checkpoint-3"]
