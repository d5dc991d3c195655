"""Printing: it never ends a run."""

import io
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fork_server import ROOT, Run, run_code
from small_runs import OUT, SMALL, words_of

from fullft.run.printing import keep_printing

KEEP = "from fullft.run.printing import keep_printing; keep_printing()\n"
UNREAD = (
    "import sys\n"
    "print('a' * 200_000); sys.stdout.flush(); print('b' * 10)\n"  # more than buffers hold, and what the end flushes
    "print('c' * 200_000, file=sys.stderr)\n"
    "open('done', 'w').write('all of it')\n"
)


def started(folder: Path, code: str, words: Sequence[str] = (), **options: Any) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("environment", {})
    return subprocess.Popen([sys.executable, *words, "-c", code], cwd=folder, env=environment, **options)


@pytest.mark.parametrize("words", [[], ["-u"]])
def test_a_closed_pipe_is_silence(words: list[str], tmp_path: Path) -> None:
    for code, is_kept in ((KEEP + UNREAD, True), (UNREAD, False)):  # the negative control
        (tmp_path / "done").unlink(missing_ok=True)
        reading, writing = os.pipe()
        os.close(reading)
        program = started(tmp_path, code, words, stdout=writing, stderr=writing)
        os.close(writing)
        assert (program.wait(60) == 0) is is_kept and (tmp_path / "done").exists() is is_kept


def test_a_terminal_that_is_gone_is_silence(tmp_path: Path) -> None:
    for code, is_kept in ((KEEP + UNREAD, True), (UNREAD, False)):
        (tmp_path / "done").unlink(missing_ok=True)
        master, terminal = os.openpty()
        os.close(master)
        program = started(tmp_path, code, stdout=terminal, stderr=terminal)
        os.close(terminal)
        assert (program.wait(60) == 0) is is_kept and (tmp_path / "done").exists() is is_kept


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("latin-1", b"\xe9 \\u6f22 \\ud800\n"),
        ("ascii", b"\\xe9 \\u6f22 \\ud800\n"),
        ("utf-8", "é 漢 \\ud800\n".encode()),
    ],
)
def test_characters_an_encoding_lacks_are_escaped(encoding: str, shown: bytes, tmp_path: Path) -> None:
    code = "import sys; text = '\\xe9 \\u6f22 \\ud800'\nprint(text); print(text, file=sys.stderr)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "environment": {"PYTHONIOENCODING": encoding}}
    assert started(tmp_path, KEEP + code, **pipes).communicate(timeout=60) == (shown, shown)
    control = started(tmp_path, code, **pipes)
    assert b"UnicodeEncodeError" in control.communicate(timeout=60)[1] and control.returncode == 1


def test_streams_closed_from_the_start_take_no_file(tmp_path: Path) -> None:
    """A file that got number 1 would hold whatever C code prints."""
    code = (
        "import os, sys\n"
        "file = open('checkpoint', 'w')\n"
        "print('lost'); print('lost', file=sys.stderr); sys.stdout.write('lost')\n"
        "for number in (1, 2): os.write(number, b'lost')\n"
        "file.write('kept')\n"
    )

    def close() -> None:
        os.close(1)
        os.close(2)

    assert started(tmp_path, KEEP + code, preexec_fn=close).wait(60) == 0
    assert (tmp_path / "checkpoint").read_text() == "kept"
    started(tmp_path, code, preexec_fn=close).wait(60)
    assert (tmp_path / "checkpoint").read_text() != "kept"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_full_disk_is_said_once(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        program = started(tmp_path, KEEP + UNREAD.replace("file=sys.stderr", ""), stdout=full, stderr=subprocess.PIPE)
    _, errors = program.communicate(timeout=60)
    assert program.returncode == 0
    assert errors == b"warning: what is printed is lost: No space left on device\n"


def test_a_pipe_that_does_not_block_loses_nothing(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    program = started(tmp_path, KEEP + "print('a' * 1_000_000)", stdout=writing)
    os.close(writing)
    received: list[bytes] = []

    def read() -> None:
        with os.fdopen(reading, "rb") as pipe:
            received.append(pipe.read())

    reader = threading.Timer(0.5, read)  # the pipe is full by then
    reader.start()
    assert program.wait(60) == 0
    reader.join()
    assert received == [b"a" * 1_000_000 + b"\n"]


def test_silenced_ranks_print_errors_alone() -> None:
    code = """
from fullft.run.printing import keep_printing, silence
if QUIET: silence()
keep_printing()
import os, sys, warnings
from tqdm import tqdm
print("printed")
os.write(1, b"written")
warnings.warn("warned")
for _ in tqdm(range(3), desc="bar"): pass
print("told", file=sys.stderr)
"""
    quiet, loud = (run_code(code.replace("QUIET", word)) for word in ("True", "False"))
    assert (quiet.stdout, quiet.stderr) == ("", "told\n")
    assert all(word in loud.stdout + loud.stderr for word in ("printed", "written", "warned", "bar", "told"))


def test_streams_of_a_notebook_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = io.StringIO()
    monkeypatch.setattr(sys, "stdout", mine)
    monkeypatch.setattr(sys, "stderr", mine)
    keep_printing()
    assert sys.stdout is mine and sys.stderr is mine


# ---------------------------------------------------------------------------------------------- whole runs

CLOSED = "import os\nreading, writing = os.pipe()\nos.close(reading)\nfor n in (1, 2): os.dup2(writing, n)\n"
RUN = """
import runpy, sys
from fork_server import ROOT
from small_runs import miniature

sys.argv = ["train.py", *WORDS]
with miniature():
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
"""


@pytest.mark.parametrize(
    "words", [["--help"], pytest.param(["--plan", "--json"], marks=pytest.mark.slow), ["--learnig_rate", "1"]]
)
def test_answers_into_a_closed_pipe_end_quietly(words: list[str], run: Run) -> None:
    done = run("-c", CLOSED + RUN.replace("WORDS", str(words)))
    assert done.returncode == (2 if "--learnig_rate" in words else 0)


def test_a_run_that_is_not_read_trains_to_the_end(run: Run, tmp_path: Path) -> None:
    assert run("-c", CLOSED + RUN.replace("WORDS", str(words_of(SMALL)))).returncode == 0
    assert (tmp_path / OUT / "config.json").exists() and (tmp_path / OUT / "loss.png").exists()


def test_samples_in_any_script_cost_no_model(run: Run, tmp_path: Path) -> None:
    narrow = "import sys\nfor stream in (sys.stdout, sys.stderr): stream.reconfigure(encoding='latin-1')\n"
    foreign = "from fullft.run.evaluation import Samples\nSamples.describe = lambda self: 'said: \\u6f22'\n"
    done = run("-c", narrow + foreign + RUN.replace("WORDS", str(words_of(SMALL))))
    assert done.returncode == 0, done.stderr
    assert "said: \\u6f22\nDone: 2 steps" in done.stdout and (tmp_path / OUT / "config.json").exists()
