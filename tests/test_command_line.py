"""The command line as a user meets it: exit codes, what is said, what survives a mistake, a signal, a full disk."""

import http.server
import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Run
from models import tiny_model
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, PreTrainedTokenizerBase, T5Config, T5ForConditionalGeneration

import fullft.run.environment
import train
from fullft.config.options import DEMO_FOLDER
from fullft.config.parse import parse_config
from fullft.errors import (
    CheckpointError,
    DataError,
    FullftError,
    ModelError,
    NonFiniteError,
    OptionsError,
    StoppedBySignal,
    as_user_error,
    report_errors,
)
from fullft.run.signals import StopRequest
from fullft.saving.checkpoint import verify

# A run of the demo in miniature; words of a test come after these, and beat them.
SMALL = "--per_device_train_batch_size 2 --gradient_accumulation_steps 1 --val_size 0 --max_steps 2".split()


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def one_thread_of_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As these tests have themselves."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def train_small(*words: str) -> None:
    train.main(parse_config([*SMALL, *words]))


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


def contents(folder: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------- before torch


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["--learnig_rate", "1"], 2)])
def test_help_and_mistyped_flags_answer_before_torch_is_imported(words: list[str], code: int) -> None:
    done = python(
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


def test_a_missing_model_offline_is_one_message_without_the_long_wait(run: Run) -> None:
    start = time.monotonic()
    # As on a machine without network: the probe itself finds that out.
    done = run("--model", "mistralai/Mistral-7B-v0.1", HF_HUB_OFFLINE="", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 4 and done.stdout == ""
    # 6 s, nearly all of it imports, on an idle machine; the hub client's own retries would take 23 s more.
    assert time.monotonic() - start < 20
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


class _Refusing(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:  # noqa: N802
        self.send_error(403)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def refusing_hub() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), _Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def silent_hub() -> Iterator[str]:
    """A hub that accepts connections and never answers."""
    with http.server.HTTPServer(("127.0.0.1", 0), _Refusing) as server:
        yield f"http://127.0.0.1:{server.server_port}"


@pytest.mark.parametrize("kind", ["refuses", "silent", "closed", "malformed"])
def test_the_hub_is_asked_once_and_briefly(
    kind: str, refusing_hub: str, silent_hub: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    endpoints = {"refuses": refusing_hub, "silent": silent_hub, "closed": "http://127.0.0.1:9", "malformed": "hub"}
    monkeypatch.setenv("HF_ENDPOINT", endpoints[kind])
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(fullft.run.environment, "PROBE_SECONDS", 0.5)
    start = time.monotonic()
    fullft.run.environment.go_offline_if_unreachable("a/b", None)
    assert time.monotonic() - start < 2
    # A refusal is an answer: the hub is there, and its client shall say what it refuses.
    assert os.environ.get("HF_HUB_OFFLINE") == (None if kind == "refuses" else "1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert capfd.readouterr().err == ""


def test_the_hub_is_not_asked_about_local_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(fullft.run.environment, "_answers", lambda: asked.append(True) or True)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    Path("rows.jsonl").write_text("{}")
    fullft.run.environment.go_offline_if_unreachable(None, "rows.jsonl")
    assert not asked and os.environ["HF_HUB_OFFLINE"] == "1"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    fullft.run.environment.go_offline_if_unreachable("a/b", "rows.jsonl")
    assert asked and "HF_HUB_OFFLINE" not in os.environ
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # the user's own word counts
    fullft.run.environment.go_offline_if_unreachable("a/b")
    assert asked == [True] and os.environ["HF_HUB_OFFLINE"] == "0"


# ---------------------------------------------------------------------------------------------- models and data


@pytest.fixture(scope="module")
def good_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    folder = tmp_path_factory.mktemp("models") / "good"
    tiny_model("llama", torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _rewrite_config(model: Path, **values: object) -> None:
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))


def _make_t5(model: Path) -> None:
    config = T5Config(vocab_size=1024, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(model)


def _make_bert(model: Path) -> None:
    config = BertConfig(vocab_size=1024, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    BertModel(config).save_pretrained(model)


def _truncate(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


OWN_CODE = {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no model folder"),
    "no weights": (lambda model: (model / "model.safetensors").unlink(), "no weights"),
    "no config": (lambda model: (model / "config.json").unlink(), "no config.json"),
    "broken config": (lambda model: (model / "config.json").write_text('{"a": '), "config.json"),
    "unknown type": (lambda model: _rewrite_config(model, model_type="fancy9"), "fancy9"),
    "own code": (lambda model: _rewrite_config(model, model_type="own", auto_map=OWN_CODE), "--trust_remote_code"),
    "more layers": (lambda model: _rewrite_config(model, num_hidden_layers=6), "lack 18 tensors"),
    "other width": (lambda model: _rewrite_config(model, hidden_size=64), ""),
    "truncated": (_truncate, ""),
    "no tokenizer": (lambda model: [file.unlink() for file in model.glob("*token*")], "tokenizer"),
    "t5": (_make_t5, "not a causal language model"),
    "bert": (_make_bert, ""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_model_is_exit_4_in_two_lines_that_name_it(
    damage: str, good_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(good_model, model)
    do_damage, part = DAMAGES[damage]
    do_damage(model)
    capfd.readouterr()
    with pytest.raises(SystemExit) as end, report_errors(debug=False):
        train_small("--model", str(model), "--dataset", str(DEMO_FOLDER / "instructions.jsonl"))
    assert end.value.code == 4
    # Progress bars come and go; what stays on the screen is the message.
    shown = capfd.readouterr().err.splitlines()
    lines = [line for line in shown if line and "%|" not in line and " examples" not in line]
    assert lines[0].startswith("error: ") and len(lines) <= 2
    assert str(model) in lines[0] and part in lines[0]
    assert not Path("full-ft-model").exists()


def test_mistakes_are_reported_in_the_order_of_how_fast_they_are_found(good_model: Path) -> None:
    with pytest.raises(OptionsError):
        train_small("--model", "no/model", "--dataset", "no.jsonl", "--max_steps", "0")
    with pytest.raises(ModelError):
        train_small("--model", "no/model", "--dataset", "no.jsonl")
    with pytest.raises(CheckpointError):
        train_small("--model", str(good_model), "--dataset", "no.jsonl", "--resume_from_checkpoint")
    with pytest.raises(DataError):
        train_small("--model", str(good_model), "--dataset", "no.jsonl")
    assert list(Path().iterdir()) == []  # nothing was begun


# ---------------------------------------------------------------------------------------------- what survives


def test_only_a_run_that_starts_replaces_an_earlier_one_and_only_its_files() -> None:
    train_small("--output_dir", "out", "--save_strategy", "steps", "--save_steps", "1", "--report_to", "tensorboard")
    assert list(Path("out").glob("runs/*tfevents*"))
    assert {"config.json", "config.yaml", "log.jsonl", "checkpoint-1", "checkpoint-2"} <= set(os.listdir("out"))
    # The written options are those of the run, to the last one.
    shutil.copy("out/config.yaml", "again.yaml")
    written = parse_config(["--config", "again.yaml", "--overwrite_output_dir"])
    words = [*SMALL, "--output_dir", "out", "--save_strategy", "steps", "--save_steps", "1"]
    given = parse_config([*words, "--report_to", "tensorboard", "--overwrite_output_dir"])
    chosen = {"activation_checkpointing": "none", "offload": "none", "compile": "false"}  # what the plan made of auto
    assert written == replace(given, **chosen)

    theirs = ["out/notes.txt", "out/checkpoint-abc/file", "out/checkpoint-9/file", "out/checkpoint-1/mine.txt"]
    for file in theirs:
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text("mine")
    before = contents("out")
    overwrite = ["--output_dir", "out", "--overwrite_output_dir"]
    for mistake, error in (
        (["--output_dir", "out"], OptionsError),
        ([*overwrite, "--max_steps", "x"], OptionsError),
        ([*overwrite, "--model", "no/model"], ModelError),
        ([*overwrite, "--dataset", "no.jsonl"], DataError),
        ([*overwrite, "--max_length", "100000", "--dataset", str(DEMO_FOLDER / "essay.txt")], FullftError),
    ):
        with pytest.raises(error):
            train_small(*mistake)
        assert contents("out") == before, mistake

    train_small(*overwrite, "--save_strategy", "no", "--max_steps", "1")
    assert all(Path(file).read_text() == "mine" for file in theirs)
    assert os.listdir("out/checkpoint-1") == ["mine.txt"] and not Path("out/checkpoint-2").exists()
    assert [json.loads(line)["step"] for line in Path("out/log.jsonl").read_text().splitlines()] == [1]


def test_wandb_missing_is_said_before_the_old_output_goes(run: Run, tmp_path: Path) -> None:
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("wandb is installed")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "log.jsonl").write_text("{}")
    done = run("--report_to", "wandb", "--output_dir", "out", "--overwrite_output_dir")
    assert (done.returncode, done.stderr) == (2, "error: report_to wandb needs wandb: pip install wandb\n")
    assert (tmp_path / "out" / "log.jsonl").read_text() == "{}"


def test_a_full_disk_is_exit_6_and_the_earlier_checkpoint_stays(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--output_dir", "out", "--save_strategy", "steps", "--save_steps", "2"]
    train_small(*words)
    good = contents("out/checkpoint-2")
    # The model fits below the limit, the optimizer's states do not: the disk fills in the middle of a checkpoint.
    limit = Path("out/model.safetensors").stat().st_size + 100_000
    assert limit < Path("out/checkpoint-2/optimizer.safetensors").stat().st_size
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, former[1]))
    try:
        with pytest.raises(SystemExit) as end, report_errors(debug=False):
            train_small(*words, "--max_steps", "4", "--resume_from_checkpoint", "--allow_changes")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert end.value.code == 6
    *_, cause, remedy = capfd.readouterr().err.splitlines()
    assert cause.startswith("error: cannot read or write") and "--resume_from_checkpoint" in remedy
    assert contents("out/checkpoint-2") == good and verify(Path("out/checkpoint-2")).state["step"] == 2
    assert not Path("out/checkpoint-4").exists() and not list(Path("out").glob(".*"))  # no half of one
    train_small(*words, "--max_steps", "4", "--resume_from_checkpoint", "--allow_changes")
    assert verify(Path("out/checkpoint-4")).state["step"] == 4


def test_a_loss_that_is_no_number_is_exit_7_and_is_not_saved() -> None:
    explosion = ["--learning_rate", "1e30", "--warmup_steps", "0", "--max_steps", "4"]
    with pytest.raises(NonFiniteError, match="step 2: the loss is nan.*\n.*--learning_rate") as error:
        train_small(*explosion, "--output_dir", "out", "--save_strategy", "steps", "--save_steps", "1")
    assert error.value.exit_code == 7
    assert not Path("out/model.safetensors").exists() and not Path("out/checkpoint-2").exists()
    weights = load_file("out/checkpoint-1/model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert "NaN" not in Path("out/log.jsonl").read_text()


# ---------------------------------------------------------------------------------------------- signals


def _start_demo(*words: str) -> subprocess.Popen[str]:
    """Start a run in the current folder, and wait until its first step is done."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *SMALL, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log, deadline = Path("full-ft-demo/log.jsonl"), time.monotonic() + 120
    while not (log.is_file() and '"loss"' in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_and_resuming_finishes_the_run(number: signal.Signals) -> None:
    words = ["--max_steps", "80", "--save_strategy", "no"]
    process = _start_demo(*words)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    (checkpoint,) = Path("full-ft-demo").glob("checkpoint-*")
    step = verify(checkpoint).state["step"]
    assert 1 <= step < 80
    assert f"{number.name}: finishing the step and saving a checkpoint" in stderr
    last = stderr.splitlines()[-1]
    assert last == f"error: stopped by {number.name} after step {step}; the same command with " + (
        "--resume_from_checkpoint continues"
    )
    assert "Traceback" not in stderr and not Path("full-ft-demo/model.safetensors").exists()
    if number == signal.SIGINT:
        train_small(*words, "--resume_from_checkpoint")
        assert json.loads(Path("full-ft-demo/train_results.json").read_text())["resumed_at_step"] == step


def test_a_second_signal_ends_at_once_and_handlers_are_restored(capfd: pytest.CaptureFixture[str]) -> None:
    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedBySignal) as end, StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        assert "a second one ends at once" in capfd.readouterr().err
        signal.raise_signal(signal.SIGINT)
    assert end.value.exit_code == 130
    assert signal.getsignal(signal.SIGTERM) is former


# ---------------------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("error", "code", "parts"),
    [
        (KeyboardInterrupt(), 130, ["interrupted"]),
        (MemoryError(), 8, ["out of memory: MemoryError", "--activation_checkpointing full", "--optim adamw_8bit"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), 8, ["20.00 GiB"]),
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.50 GiB of which "
                "1.10 GiB is free. Including non-PyTorch memory, this process has 22.39 GiB memory in use. Of the "
                "allocated memory 18.70 GiB is allocated by PyTorch, and 3.25 GiB is reserved by PyTorch but "
                "unallocated. If reserved but unallocated memory is large try setting ..."
            ),
            8,
            ["2.00 GiB", "3.25 GiB of it", "PYTORCH_ALLOC_CONF=expandable_segments:True", "cheapest remedies"],
        ),
        (RuntimeError("CUDA error: out of memory"), 8, ["--per_device_train_batch_size"]),
        (OSError(12, "Cannot allocate memory"), 8, ["out of memory"]),
        (OSError(28, "No space left on device", "f"), 6, ["No space left", "--output_dir"]),
        (PermissionError(13, "Permission denied", "f"), 6, ["Permission denied"]),
        (Exception("I/O error: File too large (os error 27)"), 6, ["File too large"]),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 1, ["torch is missing", "make train"]),
        (ValueError("why\n\n  ever"), 1, ["unexpected ValueError: why ever", "--debug"]),
        (ConnectionResetError(104, "reset"), 1, ["unexpected ConnectionResetError"]),
        (ModelError("as it is"), 4, ["as it is"]),
    ],
)
def test_every_exception_becomes_an_exit_code_and_two_lines(
    error: BaseException, code: int, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end, report_errors(debug=False):
        raise error
    message = capsys.readouterr().err.strip()
    assert end.value.code == code
    assert message.startswith("error: ") and len(message.splitlines()) <= 2
    assert all(part in message for part in parts), message


def test_memory_that_torch_cannot_get_is_exit_8() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 50)
    assert as_user_error(error.value).exit_code == 8


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    for debug in (False, True):
        with pytest.raises(SystemExit), report_errors(debug):
            raise ModelError("no such model")
        message = capsys.readouterr().err
        assert ("Traceback" in message) is debug and message.endswith("error: no such model\n")


@pytest.mark.parametrize(
    ("statement", "code", "line"),
    [
        ("import torhc", 1, "error: the Python package torhc is missing or broken"),
        ("raise KeyboardInterrupt", 130, "error: interrupted"),
        ("raise ValueError('why')", 1, "error: unexpected ValueError: why"),
    ],
)
def test_what_goes_wrong_in_imports_is_told_in_the_same_way(statement: str, code: int, line: str) -> None:
    done = python(f"from fullft.errors import report_uncaught_errors; report_uncaught_errors(False)\n{statement}")
    assert done.returncode == code
    assert done.stderr.strip().startswith(line) and "Traceback" not in done.stderr
