"""`benchmarks/gpu.py`, dry: its processes, its page, and two of its parts at toy size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fork_server import ROOT

pytestmark = pytest.mark.emulated


def test_command_writes_a_page(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--emulated", "--minutes", "3"]
    done = subprocess.run(
        [*command, "--only", "memory", "ranks", "--work", str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (page,) = tmp_path.glob("gpu-*.md")
    assert "planned / allocated" in page.read_text() and "Skipped: there is 1 card" in page.read_text()
    parts = json.loads(page.with_suffix(".json").read_text())["parts"]
    (rows,) = parts["memory"]["tables"].values()
    assert len(rows) == 3 and parts["memory"]["failed"] == []
    for row in rows:
        assert row["tracked, MiB"] == pytest.approx(row["allocated, MiB"], rel=0.02)
