"""Offloading changes where bytes live and nothing else: each placement gives bitwise the resident run's numbers."""

import errno
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_config, optimizer_of, summed_loss
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

import train
from fullft.config.config import Config
from fullft.config.parse import parse_config
from fullft.config.steps import Calendar
from fullft.errors import DiskError, OptionsError, report_errors
from fullft.model.load import load_model
from fullft.optim import adamw, gradients
from fullft.optim import adamw_8bit as blockwise
from fullft.optim.adamw import AdamW
from fullft.run.log import Metrics
from fullft.saving.checkpoint import restore, save_checkpoint, verify
from fullft.storage import tiers as offload
from fullft.storage.tiers import ChunkStream, DiskArray, Storage, fill, host_pieces

VOCABULARY = 1021  # odd, as other sizes below: no tensor is a whole number of chunks, pages or blocks
PLACEMENTS = [
    "optimizer=host",
    "optimizer=disk",
    "gradients=host",
    "gradients=disk",
    "optimizer=disk,gradients=disk",
    "optimizer=host,gradients=disk",
    "optimizer=disk,gradients=host",
    "optimizer=host,gradients=host",
]


def odd_model(tied: bool = False, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=43,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


@dataclass
class Course:
    """What a run computed."""

    losses: list[float]
    norms: list[float]
    tensors: dict[str, torch.Tensor]

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Course) and self.tensors.keys() == other.tensors.keys()
        return (self.losses, self.norms) == (other.losses, other.norms) and not self.differing(other)

    def differing(self, other: "Course") -> list[str]:
        return [name for name, tensor in self.tensors.items() if not torch.equal(tensor, other.tensors[name])]


def content(array: offload.Array) -> torch.Tensor:
    return torch.cat([piece.flatten().clone() for piece in host_pieces(array)])


def steps(model: PreTrainedModel, optimizer: AdamW, config: Config, first: int, last: int) -> Course:
    """Take steps as train.py does; the learning rate and the batches depend on the step alone."""
    losses, norms = [], []
    for step in range(first, last + 1):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / step
        random = torch.Generator().manual_seed(step)
        for _ in range(config.gradient_accumulation_steps or 1):
            ids = torch.randint(0, VOCABULARY, (2, 7), generator=random)
            loss = summed_loss(model, ids) / 12
            loss.backward()
            losses.append(loss.item())
        norms.append(optimizer.clip_gradients(config.max_grad_norm).item())
        optimizer.step()
        optimizer.zero_grad()
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        tensors |= {f"{name}.{key}": content(array) for key, array in optimizer.states_of(parameter).items()}
    return Course(losses, norms, tensors)


def course(folder: Path, tied: bool = False, last: int = 3, **options: Any) -> Course:
    config = make_config(
        **{"output_dir": str(folder), "gradient_accumulation_steps": 1, "weight_decay": 0.1, **options}
    )
    model = odd_model(tied, torch.float32 if config.precision == "fp32" else torch.bfloat16)
    return steps(model, optimizer_of(model, config), config, 1, last)


# ---------------------------------------------------------------------------------------------- placements


@pytest.fixture(autouse=True)
def chunks(small_chunks: int) -> int:
    """The largest tensors have six chunks: twice as many as are under way at a time."""
    assert 5 * small_chunks < VOCABULARY * 24 < 6 * small_chunks
    return small_chunks


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.1])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_placement_is_bitwise_the_resident_run(
    tied: bool, accumulation: int, max_grad_norm: float, tmp_path: Path
) -> None:
    options = {"gradient_accumulation_steps": accumulation, "max_grad_norm": max_grad_norm}
    resident = course(tmp_path, tied, **options)
    assert not max_grad_norm or min(resident.norms) > max_grad_norm  # clipping clips
    for placement in PLACEMENTS:
        assert course(tmp_path, tied, **options, offload=placement) == resident, placement
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "options",
    [{"precision": "fp32"}, {"precision": "bf16-mixed"}, {"master_weights": "none"}, {"master_weights": "stochastic"}],
    ids=lambda options: " ".join(options.values()),
)
@pytest.mark.parametrize("accumulation", [1, 4])
def test_so_it_is_with_other_precisions_and_masters(accumulation: int, options: dict[str, str], tmp_path: Path) -> None:
    options = {**options, "gradient_accumulation_steps": accumulation}
    resident = course(tmp_path, **options)
    for placement in PLACEMENTS:
        assert course(tmp_path, **options, offload=placement) == resident, placement


def test_stochastic_rounding_depends_on_the_seed(tmp_path: Path) -> None:
    """The negative control."""
    resident = course(tmp_path, master_weights="stochastic")
    assert course(tmp_path, master_weights="stochastic", seed=43, offload="optimizer=host") != resident


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_released_gradients_are_bitwise_the_resident_ones(tied: bool, tier: str, tmp_path: Path) -> None:
    resident = course(tmp_path, tied, max_grad_norm=0.0)
    released = course(tmp_path, tied, max_grad_norm=0.0, offload=f"gradients=released,optimizer={tier}")
    assert released == resident


def test_another_order_of_micro_batches_or_one_step_less_would_be_noticed(tmp_path: Path) -> None:
    """The negative control of the comparison itself."""
    resident = course(tmp_path, gradient_accumulation_steps=4)
    assert course(tmp_path, gradient_accumulation_steps=4, adam_beta2=0.9) != resident
    assert len(course(tmp_path, gradient_accumulation_steps=4, last=2).differing(resident)) == len(resident.tensors)


# ---------------------------------------------------------------------------------------------- 8 bits


class Matrix(nn.Module):
    """One matrix of two and a half chunks, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(809, 811, dtype=torch.bfloat16)


@pytest.mark.parametrize("max_norm", [0.0, 0.1])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_8_bit_states_too(placement: str, max_norm: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (adamw, gradients, offload):
        monkeypatch.setattr(module, "CHUNK", 1 << 18)  # of which the scales of the blocks fill a page
    monkeypatch.setattr(blockwise, "TILE", 1 << 16)
    monkeypatch.setattr(blockwise, "_compiled_update", lambda: blockwise._update)  # compiling takes longer
    results = []
    for where in ("none", placement):
        model = Matrix()
        config = make_config(optim="adamw_8bit", offload=where, output_dir=str(tmp_path), learning_rate=1e-2)
        optimizer = optimizer_of(model, config)
        random = torch.Generator().manual_seed(1)
        norms = []
        for _ in range(2):
            for _ in range(2):
                inputs = torch.randn(2, 809, generator=random).bfloat16()
                (model.linear(inputs).float() ** 2).sum().backward()
            norms.append(optimizer.clip_gradients(max_norm))
            optimizer.step()
            optimizer.zero_grad()
        states = optimizer.states_of(model.linear.weight)
        assert states["exp_avg"].dtype == torch.uint8 and states["exp_avg_absmax"].numel() == 2563
        results.append([content(array) for array in states.values()] + [*model.parameters(), *norms])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


# ---------------------------------------------------------------------------------------------- resuming

EVERYWHERE = ["none", "optimizer=host", "optimizer=disk", "gradients=disk", "optimizer=disk,gradients=host"]


@pytest.mark.parametrize("masters", ["split", "stochastic", "none"])
def test_resuming_in_any_placement_what_any_other_has_begun_is_bitwise_the_uninterrupted_run(
    masters: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    def config_of(place: str, folder: str) -> Config:
        return make_config(
            master_weights=masters,
            offload=place,
            output_dir=str(tmp_path / folder),
            gradient_accumulation_steps=2,
            weight_decay=0.1,
        )

    config = config_of("none", "whole")
    model = odd_model()
    whole = steps(model, optimizer_of(model, config), config, 1, 4)
    for number, begun in enumerate(EVERYWHERE):
        config = config_of(begun, f"begun-{number}")
        model = odd_model()
        optimizer = optimizer_of(model, config)
        steps(model, optimizer, config, 1, 2)
        folder = save_checkpoint(config, Calendar(config, 9), 2, model, tokenizer, optimizer, "rows")
        for continued in EVERYWHERE:
            config = config_of(continued, f"begun-{number}")
            storage = Storage(torch.device("cpu"), tmp_path)
            model = load_model(config, str(folder), storage)
            optimizer = optimizer_of(model, config)
            assert restore(verify(folder), config, model, optimizer, "rows") == 2
            resumed = steps(model, optimizer, config, 3, 4)
            assert (resumed.losses, resumed.norms) == (whole.losses[4:], whole.norms[2:])
            assert resumed.differing(whole) == [], (begun, continued)


def test_resuming_without_the_number_of_steps_is_another_run(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The negative control."""
    config = make_config(output_dir=str(tmp_path), gradient_accumulation_steps=1)
    model = odd_model()
    optimizer = optimizer_of(model, config)
    steps(model, optimizer, config, 1, 2)
    folder = save_checkpoint(config, Calendar(config, 9), 2, model, tokenizer, optimizer, "rows")
    whole = steps(model, optimizer, config, 3, 4)
    model = load_model(config, str(folder), Storage(torch.device("cpu"), tmp_path))
    optimizer = optimizer_of(model, config)
    restore(verify(folder), config, model, optimizer, "rows")
    optimizer.num_steps = 0
    assert steps(model, optimizer, config, 3, 4) != whole


# ---------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (
            "--offload gradients=released --max_grad_norm 0",
            ["nothing accumulates: add --gradient_accumulation_steps 1"],
        ),
        (
            "--offload gradients=released --max_grad_norm 0 --global_batch_size 8 --per_device_train_batch_size 4",
            ["nothing accumulates"],
        ),
        (
            "--offload gradients=released --gradient_accumulation_steps 1",
            ["before the global norm is known: add --max_grad_norm 0, or keep them with gradients=host"],
        ),
        ("--offload gradients=released", ["nothing accumulates", "before the global norm is known"]),
        ("--offload optimizer=host --optim paged_adamw_8bit", ["leave out optimizer=host"]),
        ("--offload parameters=host --activation_checkpointing none", ["add --activation_checkpointing full"]),
        ("--offload optimizer=released", ["'optimizer=released' is neither none nor one of"]),
        ("--offload optimizer=host,optimizer=disk", ["optimizer is placed twice"]),
        ("--offload everything", ["'everything' is neither none nor one of"]),
    ],
)
def test_what_cannot_be_is_refused_with_its_remedy(words: str, messages: list[str], tmp_path: Path) -> None:
    with pytest.raises(OptionsError) as refusal:
        parse_config(["--model", "x", "--output_dir", str(tmp_path), *words.split()])
    lines = str(refusal.value).splitlines()
    assert len(lines) == len(messages)
    for line, message in zip(lines, messages, strict=True):
        assert message in line


def test_what_can_be_is_not_refused(tmp_path: Path) -> None:
    words = ["--model", "x", "--output_dir", str(tmp_path)]
    alone = ["--gradient_accumulation_steps", "1", "--max_grad_norm", "0"]
    assert parse_config([*words, *alone, "--offload", "gradients=released"]).offload == "gradients=released"
    assert parse_config([*words, "--offload", "optimizer=disk", "gradients=host"]).offload == (
        "optimizer=disk,gradients=host"
    )


# ---------------------------------------------------------------------------------------------- the disk

SMALL = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "val_size": 0,
    "max_length": 64,
    "precision": "bf16-true",
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_steps": 1,
    "output_dir": "out",
}


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A resident run of the demo, of two steps, with checkpoint-2."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    train_small(output_dir=folder, max_steps=2)
    return folder


def train_small(**options: Any) -> None:
    train.main(parse_config([f"--{name}={value}" for name, value in (SMALL | options).items()]))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


RESUMED = {"resume_from_checkpoint": "newest", "allow_changes": True, "max_steps": 4}


def failing_writes(error: int, after_step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let writes past the page cache fail once so many steps are done."""
    done: list[int] = []
    logged, written = Metrics.step, os.pwritev

    def log(self: Metrics, step: int, *arguments: Any) -> None:
        done.append(step)
        logged(self, step, *arguments)

    def write(*arguments: Any) -> int:
        if after_step in done:
            raise OSError(error, os.strerror(error))
        return written(*arguments)

    monkeypatch.setattr(Metrics, "step", log)
    monkeypatch.setattr(os, "pwritev", write)


@pytest.mark.parametrize(
    ("placement", "error"), [("optimizer=disk", errno.ENOSPC), ("gradients=disk", errno.EIO)], ids=str
)
def test_a_disk_that_fails_in_a_step_is_exit_6_and_the_earlier_checkpoint_stays(
    placement: str,
    error: int,
    finished: Path,
    in_empty_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(finished, "out")
    before = files_of(Path("out/checkpoint-2"))
    with monkeypatch.context() as patch:
        failing_writes(error, 3, patch)
        with pytest.raises(SystemExit) as end, report_errors(debug=False):
            train_small(**RESUMED, offload=placement)
    assert end.value.code == 6
    cause, remedy = capfd.readouterr().err.splitlines()[-2:]
    assert cause.startswith("error: cannot read or write") and "--resume_from_checkpoint" in remedy
    assert files_of(Path("out/checkpoint-2")) == before and verify(Path("out/checkpoint-2")).state["step"] == 2
    assert not Path("out/checkpoint-4").exists() and not list(Path("out").glob(".*"))
    # It goes on from there, and arrives where a resident run does.
    train_small(**RESUMED, offload=placement)
    shutil.copytree(finished, "resident")
    train_small(**RESUMED, offload="none", output_dir="resident")
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert Path("out/checkpoint-4", file).read_bytes() == Path("resident/checkpoint-4", file).read_bytes()


def test_no_room_on_the_disk_is_exit_6_before_anything_is_written(
    finished: Path, in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, "out")
    before = files_of(Path("out"))

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(SystemExit) as end, report_errors(debug=False):
        train_small(**RESUMED, offload="optimizer=disk")
    assert end.value.code == 6
    last = capfd.readouterr().err.splitlines()[-1]
    assert "there is no room for" in last and "No space left on device" in last and "--output_dir" in last
    assert files_of(Path("out")) == before


def test_a_file_that_somebody_truncates_is_an_error_and_no_zeros(tmp_path: Path) -> None:
    config = make_config(offload="optimizer=disk", output_dir=str(tmp_path), gradient_accumulation_steps=1)
    model = odd_model()
    optimizer = optimizer_of(model, config)
    steps(model, optimizer, config, 1, 1)
    file = optimizer.storage._file
    assert file is not None and file._file is not None
    os.ftruncate(file._file.fileno(), file.num_bytes // 2)
    with pytest.raises(DiskError, match="shorter than it was written.*--resume_from_checkpoint") as error:
        steps(model, optimizer, config, 2, 2)
    assert error.value.exit_code == 6


def test_the_file_has_no_name_and_takes_its_space_at_once(tmp_path: Path) -> None:
    """Where the output folder does not exist yet, the nearest one above it has room for the file."""
    config = make_config(offload="optimizer=disk,gradients=disk", output_dir=str(tmp_path / "not" / "yet"))
    model = odd_model()
    optimizer = optimizer_of(model, config)
    with optimizer.rehearsal():
        assert os.listdir(tmp_path) == []
    file = optimizer.storage._file
    assert file is not None and file._file is not None
    status = os.fstat(file._file.fileno())
    assert status.st_nlink == 0 and status.st_dev == os.stat(tmp_path).st_dev
    assert status.st_size == optimizer.storage.disk_bytes
    assert 512 * status.st_blocks >= status.st_size > 10 * sum(parameter.numel() for parameter in model.parameters())
    steps(model, optimizer, config, 1, 1)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("numel", [1, 4095, 4096, 4097, 10000])
def test_what_is_written_to_disk_is_read_back_and_begins_as_zeros(
    numel: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    storage = Storage(torch.device("cpu"), tmp_path)
    arrays = [storage.zeros("disk", numel, dtype) for _ in range(3)]
    values = torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    assert all(isinstance(array, DiskArray) and array.offset % 4096 == 0 for array in arrays)
    fill(arrays[1], values)
    found = [content(array) for array in arrays]
    assert torch.equal(found[1].view(torch.uint8), values.view(torch.uint8))
    assert not found[0].view(torch.uint8).any() and not found[2].view(torch.uint8).any()


# ---------------------------------------------------------------------------------------------- negative controls


def _no_way_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ChunkStream, "_take_back", lambda *_: None)


def _next_chunk(patch: pytest.MonkeyPatch) -> None:
    """Read what lies a chunk further on, where there is one."""
    read = DiskArray.read

    def wrong(self: DiskArray, start: int, count: int, target: torch.Tensor) -> None:
        is_there = start + 2 * offload.CHUNK <= self.numel()
        read(self, start + offload.CHUNK if is_there else start, count, target)

    patch.setattr(DiskArray, "read", wrong)


def _forgotten_sums(patch: pytest.MonkeyPatch) -> None:
    """Let each micro-batch's gradient take the place of the sum."""
    start = gradients._Departures.start
    patch.setattr(gradients._Departures, "start", lambda self, gradient, sums, _: start(self, gradient, sums, True))


def _early_norm(patch: pytest.MonkeyPatch) -> None:
    """Count the first chunk of each gradient alone."""
    run = ChunkStream.run

    def shortened(self: ChunkStream, jobs: Any) -> Iterator[dict[str, torch.Tensor]]:
        for views in run(self, jobs):
            is_norm = views.keys() == {"gradient"}
            yield {"gradient": views["gradient"] * 0} if is_norm and views["gradient"].numel() < 4096 else views

    patch.setattr(ChunkStream, "run", shortened)


@pytest.mark.parametrize(
    ("break_it", "is_noticed"),
    [
        (_no_way_back, {"optimizer=host", "optimizer=disk"}),
        (_next_chunk, {"optimizer=disk", "gradients=disk"}),
        (_forgotten_sums, {"gradients=disk"}),  # on a CPU gradients reach the host without a journey
        (_early_norm, {"optimizer=host", "optimizer=disk", "gradients=host", "gradients=disk"}),
    ],
)
def test_mistakes_in_moving_would_be_noticed(
    break_it: Callable[[pytest.MonkeyPatch], None],
    is_noticed: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resident = course(tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.1)
    break_it(monkeypatch)
    for placement in itertools.islice(PLACEMENTS, 4):
        moved = course(tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.1, offload=placement)
        assert (moved != resident) is (placement in is_noticed), placement
