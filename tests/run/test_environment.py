"""The hub: asked once, briefly, and only where a run needs it."""

import http.server
import os
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import make_config

import fullft.run.environment
from fullft.run.environment import go_offline_if_unreachable, prepare_hub, use_expandable_segments


class _Refusing(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:  # noqa: N802
        self.send_error(403)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def refusing_hub() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), _Refusing) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
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
    # Only silence lasts until the end; the others answer or fail at once, however busy the machine is.
    seconds = 0.2 if kind == "silent" else 60
    monkeypatch.setattr(fullft.run.environment, "PROBE_SECONDS", seconds)
    asked: list[float] = []
    urlopen, wait = urllib.request.urlopen, threading.Event.wait
    monkeypatch.setattr(
        urllib.request, "urlopen", lambda *more, timeout: asked.append(timeout) or urlopen(*more, timeout=timeout)
    )
    waited: list[float | None] = []
    monkeypatch.setattr(
        threading.Event, "wait", lambda self, timeout=None: waited.append(timeout) or wait(self, timeout)
    )
    go_offline_if_unreachable("a/b", None)
    assert asked == ([] if kind == "malformed" else [seconds])  # a malformed address cannot be asked
    assert waited.count(seconds) == 1  # a thread's start waits, too, and other threads do
    # A refusal is an answer: the hub is there, and its client shall say what it refuses.
    assert os.environ.get("HF_HUB_OFFLINE") == (None if kind == "refuses" else "1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert capfd.readouterr().err == ""


def test_the_hub_is_not_asked_about_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[bool] = []
    monkeypatch.setattr(fullft.run.environment, "_answers", lambda: asked.append(True) or True)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    Path("rows.jsonl").write_text("{}")
    go_offline_if_unreachable(None, "rows.jsonl")
    assert not asked and os.environ["HF_HUB_OFFLINE"] == "1"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    go_offline_if_unreachable("a/b", "rows.jsonl")
    assert asked and "HF_HUB_OFFLINE" not in os.environ
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # the user's own word counts
    go_offline_if_unreachable("a/b")
    assert asked == [True] and os.environ["HF_HUB_OFFLINE"] == "0"


def test_held_out_rows_from_the_hub_count_as_a_need_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(fullft.run.environment, "_answers", lambda: asked.append(True) or True)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    (tmp_path / "rows.jsonl").write_text("{}")
    prepare_hub(make_config(model=str(tmp_path), dataset=str(tmp_path / "rows.jsonl"), eval_dataset="a/b"))
    assert asked and "HF_HUB_OFFLINE" not in os.environ
    prepare_hub(make_config(model=str(tmp_path), dataset=str(tmp_path / "rows.jsonl")))
    assert len(asked) == 1 and os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("platform", "version", "before", "after"),
    [
        ("linux", "2.13.0+cu130", {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ("linux", "2.11.0", {}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ("linux", "2.13.0", {"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
        ("linux", "2.13.0", {"PYTORCH_CUDA_ALLOC_CONF": ""}, {"PYTORCH_CUDA_ALLOC_CONF": ""}),
        ("win32", "2.13.0", {}, {}),
    ],
)
def test_segments_grow_unless_the_user_decided(
    platform: str, version: str, before: dict[str, str], after: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = dict(before)
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr(fullft.run.environment, "version", lambda _: version)
    use_expandable_segments()
    assert environment == after


def test_torch_reads_the_name_that_is_set() -> None:
    """The library has the name in it: it could not be read otherwise."""
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    if not library.exists():
        pytest.skip("torch has its libraries elsewhere")
    assert library.read_bytes().count(b"\0PYTORCH_ALLOC_CONF\0") == 1
