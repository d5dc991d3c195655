"""The command line as a user meets it: what is answered before torch, what survives a mistake or a full disk."""

import importlib.util
import json
import os
import resource
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fork_server import Run, run_code
from safetensors.torch import load_file
from small_runs import EXPLODES, OUT, SMALL, contents, train_small, words_of

from fullft.config.options import DEMO_FOLDER
from fullft.config.parse import parse_config
from fullft.errors import (
    CheckpointError,
    DataError,
    FullftError,
    ModelError,
    NonFiniteError,
    OptionsError,
    report_errors,
)
from fullft.saving.checkpoint import verify


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------------------------------------- before torch


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["--learnig_rate", "1"], 2)])
def test_help_and_mistakes_answer_before_torch(words: list[str], code: int) -> None:
    done = run_code(
        f"import atexit, runpy, sys; sys.argv = {['train.py', *words]}\n"
        "heavy = ('torch', 'transformers', 'datasets', 'numpy')\n"
        "atexit.register(lambda: print('HEAVY', [name for name in heavy if name in sys.modules]))\n"
        "runpy.run_path('train.py', run_name='__main__')"
    )
    assert done.returncode == code
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    if code:
        assert done.stderr == "error: unknown option --learnig_rate; did you mean --learning_rate?\n"
    else:
        assert "--learning_rate X" in done.stdout and done.stderr == ""


def test_the_help_is_shown_in_an_own_process(run_cold: Run) -> None:
    done = run_cold("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--learning_rate X" in done.stdout


@pytest.fixture
def broken_hub() -> Iterator[tuple[str, list[object]]]:
    """A hub that closes every connection without an answer; its address, and the connections so far."""
    connections: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):  # closed
                while True:
                    connection, address = server.accept()
                    connections.append(address)
                    connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", connections
        server.shutdown(socket.SHUT_RDWR)  # or accept would wait on
        thread.join()


def test_a_missing_model_offline_asks_the_hub_once(run_cold: Run, broken_hub: tuple[str, list[object]]) -> None:
    endpoint, connections = broken_hub
    # As on a machine without network: the probe itself finds that out. transformers learns it while it is imported.
    done = run_cold("--model", "mistralai/Mistral-7B-v0.1", HF_HUB_OFFLINE="", HF_ENDPOINT=endpoint)
    assert done.returncode == 4 and done.stdout == ""
    assert len(connections) == 1  # the hub client's own retries, which take 23 s, would be many more
    assert len(done.stderr.splitlines()) <= 2
    for part in (
        "mistralai/Mistral-7B-v0.1",  # what was looked for
        "hf download mistralai/Mistral-7B-v0.1 --local-dir Mistral-7B-v0.1",
        "--model Mistral-7B-v0.1",  # how to pass a folder
        "gated",
        "hf auth login",
    ):
        assert part in done.stderr
    assert not Path("full-ft-Mistral-7B-v0.1").exists()


# ---------------------------------------------------------------------------------------------- models and data


def test_mistakes_found_faster_are_reported_first(model_folder: Path) -> None:
    with pytest.raises(OptionsError):
        train_small(["--model", "no/model", "--dataset", "no.jsonl", "--max_steps", "0"])
    with pytest.raises(ModelError):
        train_small(["--model", "no/model", "--dataset", "no.jsonl"])
    with pytest.raises(CheckpointError):
        train_small(["--model", str(model_folder), "--dataset", "no.jsonl", "--resume_from_checkpoint"])
    with pytest.raises(DataError):
        train_small(["--model", str(model_folder), "--dataset", "no.jsonl"])
    assert list(Path().iterdir()) == []  # nothing was begun


# ---------------------------------------------------------------------------------------------- what survives


def test_a_run_that_starts_replaces_own_files_only() -> None:
    train_small(save_steps=1, report_to="tensorboard")
    assert list(OUT.glob("runs/*tfevents*"))
    assert {"config.json", "config.yaml", "log.jsonl", "checkpoint-1", "checkpoint-2"} <= set(os.listdir(OUT))
    # The written options are those of the run, to the last one.
    shutil.copy(OUT / "config.yaml", "again.yaml")
    written = parse_config(["--config", "again.yaml", "--overwrite_output_dir"])
    words = words_of(SMALL | {"save_steps": 1, "report_to": "tensorboard"})
    chosen = {"activation_checkpointing": "none", "offload": "none", "compile": "false"}  # what the plan made of auto
    assert written == replace(parse_config([*words, "--overwrite_output_dir"]), **chosen)

    theirs = [OUT / name for name in ("notes.txt", "checkpoint-abc/file", "checkpoint-9/file", "checkpoint-1/mine.txt")]
    for file in theirs:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    before = contents(OUT)
    for mistake, error in (
        ({"overwrite_output_dir": False}, OptionsError),
        ({"max_steps": "x"}, OptionsError),
        ({"model": "no/model"}, ModelError),
        ({"dataset": "no.jsonl"}, DataError),
        ({"max_length": 100_000, "dataset": DEMO_FOLDER / "essay.txt"}, FullftError),
    ):
        with pytest.raises(error):
            train_small(**{"overwrite_output_dir": True, **mistake})
        assert contents(OUT) == before, mistake

    train_small(overwrite_output_dir=True, save_strategy="no", max_steps=1)
    assert all(file.read_text() == "mine" for file in theirs)
    assert os.listdir(OUT / "checkpoint-1") == ["mine.txt"] and not (OUT / "checkpoint-2").exists()
    assert [json.loads(line)["step"] for line in (OUT / "log.jsonl").read_text().splitlines()] == [1]


def test_missing_wandb_is_reported_before_anything_goes(run_cold: Run, tmp_path: Path) -> None:
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("wandb is installed")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "log.jsonl").write_text("{}")
    done = run_cold("--report_to", "wandb", "--output_dir", "out", "--overwrite_output_dir")
    assert (done.returncode, done.stderr) == (2, "error: report_to wandb needs wandb: pip install wandb\n")
    assert (tmp_path / "out" / "log.jsonl").read_text() == "{}"


def test_a_full_disk_spares_the_earlier_checkpoint(capfd: pytest.CaptureFixture[str]) -> None:
    train_small()
    good = contents(OUT / "checkpoint-2")
    resumed = {"max_steps": 4, "resume_from_checkpoint": "newest", "allow_changes": True}
    # The model fits below the limit, the optimizer's states do not: the disk fills in the middle of a checkpoint.
    limit = (OUT / "model.safetensors").stat().st_size + 100_000
    assert limit < (OUT / "checkpoint-2" / "optimizer.safetensors").stat().st_size
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, former[1]))
    try:
        with pytest.raises(SystemExit) as end, report_errors(debug=False):
            train_small(**resumed)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert end.value.code == 6
    *_, cause, remedy = capfd.readouterr().err.splitlines()
    assert cause.startswith("error: cannot read or write") and "--resume_from_checkpoint" in remedy
    assert contents(OUT / "checkpoint-2") == good and verify(OUT / "checkpoint-2").state["step"] == 2
    assert not (OUT / "checkpoint-4").exists() and not list(OUT.glob(".*"))  # no half of one
    train_small(**resumed)
    assert verify(OUT / "checkpoint-4").state["step"] == 4


def test_a_loss_of_nan_is_not_saved() -> None:
    with pytest.raises(NonFiniteError, match="step 2: the loss is nan.*\n.*--learning_rate") as error:
        train_small(**EXPLODES, save_steps=1)
    assert error.value.exit_code == 7
    assert not (OUT / "model.safetensors").exists() and not (OUT / "checkpoint-2").exists()
    weights = load_file(OUT / "checkpoint-1" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert "NaN" not in (OUT / "log.jsonl").read_text()


# ---------------------------------------------------------------------------------------------- whole processes

MINIATURE = "--per_device_train_batch_size 2 --gradient_accumulation_steps 1 --max_steps 2 --max_length 64".split()


def _check_demo(done: subprocess.CompletedProcess[str], folder: Path) -> None:
    assert done.returncode == 0, done.stderr
    assert "Done: 2 steps" in done.stdout and "error" not in done.stderr
    assert (folder / "full-ft-demo" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "full-ft-demo" / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_the_demo_runs_in_a_forked_process(run: Run, tmp_path: Path) -> None:
    _check_demo(run(*MINIATURE), tmp_path)


@pytest.mark.slow
def test_the_demo_runs_alike_in_a_cold_process(run: Run, run_cold: Run, tmp_path: Path) -> None:
    _check_demo(run_cold(*MINIATURE), tmp_path)
    cold = load_file(tmp_path / "full-ft-demo" / "model.safetensors")
    shutil.rmtree(tmp_path / "full-ft-demo")
    _check_demo(run(*MINIATURE), tmp_path)  # what other tests rely on: a fork is as good
    forked = load_file(tmp_path / "full-ft-demo" / "model.safetensors")
    assert cold.keys() == forked.keys()
    assert all(torch.equal(values, forked[name]) for name, values in cold.items())
