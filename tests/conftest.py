"""What all tests share: an own cache, no hub, one thread, small chunks, a way to run the command line."""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# Before any library reads them.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="fullft-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no pool of threads, which a forked process would wait for in vain

import pytest
import torch
from fork_server import ROOT, Forked, ForkServer, Run
from models import tiny_model
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fullft.config.options import DEMO_FOLDER
from fullft.cpu import sums
from fullft.optim import adamw, gradients
from fullft.storage import tiers

SMALL_CHUNK = 4096  # a whole number of pages of every dtype
torch.set_num_threads(1)  # so small models compute no faster on two, and far slower where others want the same cores


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """The demo's byte-level tokenizer: 1024 tokens, with a chat template, bos = eos = pad."""
    return AutoTokenizer.from_pretrained(DEMO_FOLDER / "model")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A tiny Llama and the demo's tokenizer, as `--model` takes them; not to be changed."""
    folder = tmp_path_factory.mktemp("models") / "good"
    tiny_model("llama", torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Put back the one thread, for a test that took another number of them."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Make chunks so small that tiny models have several per tensor, and the norm's tiles smaller still."""
    for module in (adamw, gradients, tiers):
        monkeypatch.setattr(module, "CHUNK", SMALL_CHUNK)
    monkeypatch.setattr(adamw, "CPU_TILE", SMALL_CHUNK // 4)
    for module in (gradients, sums):
        monkeypatch.setattr(module, "TILE", SMALL_CHUNK // 4)
    monkeypatch.setattr(sums, "ROW", SMALL_CHUNK // 32)
    return SMALL_CHUNK


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """One process with everything imported, which forks for each command line."""
    server = ForkServer()
    yield server
    server.close()


def _environment(changes: dict[str, str]) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"} | changes


@pytest.fixture
def run(tmp_path: Path, fork_server: ForkServer) -> Run:
    """Run `train.py` with the given words in an empty folder; stdout and stderr come back as text."""

    def run_forked(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return fork_server.run(*words, cwd=tmp_path, environment=_environment(environment))

    return run_forked


@pytest.fixture
def start_ranks(tmp_path: Path, fork_server: ForkServer) -> Callable[..., list[Forked]]:
    """Start `train.py` with the given words as each of several ranks, in an empty folder."""

    def start(count: int, *words: str) -> list[Forked]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        together = {"WORLD_SIZE": f"{count}", "LOCAL_WORLD_SIZE": f"{count}"}
        together |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
        environments = [_environment({**together, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}) for rank in range(count)]
        return [Forked(fork_server, list(words), tmp_path, environment) for environment in environments]

    return start


@pytest.fixture
def run_cold(tmp_path: Path) -> Run:
    """Run `python train.py` as a user does: for what depends on imports and on the environment at their time."""

    def run_anew(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *words],
            cwd=tmp_path,
            env=_environment(environment),
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run_anew
