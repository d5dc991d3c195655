"""The command for whoever has a card: what fails or hangs leaves the rest, and is said."""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fork_server import ROOT

sys.path.append(str(ROOT / "benchmarks"))  # where these modules find each other
# ruff: noqa: E402
import gpu
from gpu_findings import Findings, as_markdown

FOUND: dict[str, Any] = {"tables": {}, "notes": [], "left_out": [], "failed": [], "skipped": "", "seconds": 1.0}


@pytest.fixture
def findings(tmp_path: Path) -> Findings:
    return Findings(tmp_path / "part.json", 60, is_emulated=True)


def test_failing_case_leaves_the_others(findings: Findings) -> None:
    def fails() -> None:
        raise ValueError("too\nlate")

    def hangs() -> None:
        raise subprocess.TimeoutExpired("sleep", 1)

    findings.carry_out(
        {"one": fails, "two": hangs, "three": partial(findings.add, "table", {"a": 1}), "four": partial(sys.exit, "no")}
    )
    saved = json.loads(findings.file.read_text())
    assert saved["failed"] == ["one: ValueError: too late", "four: SystemExit: no"]
    assert saved["left_out"] == ["two"]
    assert saved["tables"] == {"table": [{"a": 1}]}


def test_cases_without_time_are_left_out(findings: Findings, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 25))  # each look at it is 25 s later than the one before
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    findings.__post_init__()
    done: list[str] = []
    findings.carry_out({name: partial(done.append, name) for name in "abc"})
    assert (done, findings.left_out) == (["a"], ["b", "c"])


def test_table_has_the_columns_of_all_rows() -> None:
    lines = as_markdown([{"what": "a|b", "ms": 1234.5}, {"what": "c", "GiB": 0.01234, "fits": True}]).splitlines()
    assert lines == [
        "| what | ms | GiB | fits |",
        "| --- | ---: | ---: | ---: |",
        "| a\\|b | 1,234 |  |  |",
        "| c |  | 0.0123 | yes |",
    ]


def test_part_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a part gets ready in a tenth of a second."""
    monkeypatch.setattr(gpu, "GRACE", 0.0)
    (tmp_path / "parts").mkdir()
    found = gpu.in_own_process("memory", 0.1, argparse.Namespace(work=tmp_path, emulated=False))
    (failure,) = found["failed"]
    assert failure.startswith("stopped after 0 s")
    assert found["seconds"] < 30


def test_part_that_cannot_begin_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu.PARTS, "memory", gpu.Part("Memory", "no_such_module", 1))
    (tmp_path / "parts").mkdir()
    (tmp_path / "torch.py").write_text("raise ImportError('a broken torch')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = gpu.in_own_process("memory", 60, argparse.Namespace(work=tmp_path, emulated=False))
    (failure,) = found["failed"]
    assert failure.startswith("ended with 1") and "a broken torch" in failure


class TestAllParts:
    """With parts that only say what they would have found."""

    @pytest.fixture(autouse=True)
    def answers(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
        facts = {"card": "NVIDIA H100 80GB"}
        answers = {name: dict(FOUND) for name in gpu.PARTS} | {"machine": FOUND | {"tables": {"machine": [facts]}}}
        self.given: dict[str, float] = {}

        def answer(name: str, seconds: float, _: argparse.Namespace) -> dict[str, Any]:
            self.given[name] = seconds
            return answers[name]

        monkeypatch.setattr(gpu, "in_own_process", answer)
        yield answers

    def carry_out(self, folder: Path) -> int:
        return gpu.carry_out(argparse.Namespace(work=folder, minutes=8, only=list(gpu.PARTS), emulated=False))

    def test_failure_is_printed_last_and_returned(
        self, answers: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.carry_out(tmp_path) == 0
        assert capsys.readouterr().out.endswith("Nothing failed.\n")
        answers["matrix"] |= {"failed": ["split: a race"]}
        answers["7b"] |= {"skipped": "too small", "left_out": ["adamw"]}
        assert self.carry_out(tmp_path) == 1
        assert capsys.readouterr().out.endswith("1 failed:\n  matrix: split: a race\n")
        page = (tmp_path / "gpu-nvidia-h100-80gb.md").read_text()
        assert "- Runs under torch's sanitizer: split: a race" in page
        assert "Skipped: too small" in page and "no time for: adamw" in page
        content = json.loads((tmp_path / "gpu-nvidia-h100-80gb.json").read_text())
        assert content["parts"].keys() == gpu.PARTS.keys()

    def test_unused_time_goes_to_later_parts(self, tmp_path: Path) -> None:
        self.carry_out(tmp_path)
        assert sum(part.share for part in gpu.PARTS.values()) > 480 > self.given["tests"]
        # All answer at once, so the last one gets all that is left.
        assert self.given["ranks"] == pytest.approx(480 - gpu.GRACE / 2, abs=5)

    def test_parts_without_time_are_said(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = argparse.Namespace(work=tmp_path, minutes=0.1, only=["memory"], emulated=False)
        assert gpu.carry_out(arguments) == 0
        assert self.given.keys() == {"machine"} and "there was no time" in capsys.readouterr().out

    def test_machine_without_a_card_ends_it(self, answers: dict[str, Any], tmp_path: Path) -> None:
        answers["machine"] = FOUND | {"skipped": "torch finds no CUDA device"}
        assert self.carry_out(tmp_path) == 1
        assert self.given.keys() == {"machine"}


def test_cases_of_all_parts_are_allowed() -> None:
    """Those for a card, which nothing else runs here: a mistake in one would show after minutes of somebody's card."""
    pytest.importorskip("accelerate")
    import gpu_7b
    import gpu_memory
    import gpu_peers
    import gpu_time
    from gpu_steps import config_of

    configs = [gpu_memory.config_of_case(*case) for case in gpu_memory.CASES]
    configs += [config_of(**changes) for _, changes in gpu_time.chosen(is_emulated=False)]
    configs += [config_of(offload="auto", activation_checkpointing="auto", **case) for case in gpu_7b.CASES.values()]
    assert len(configs) == 12 + 10 + 2
    assert set(gpu_peers.SYSTEMS) <= gpu_peers.OURS.keys() | gpu_peers.PEERS.keys()
    with pytest.raises(AssertionError):  # the negative control
        config_of(offload="parameters=host")


def test_parts_for_two_cards_need_no_peer() -> None:
    """Of what trains in other ways, accelerate, TRL and the like, nothing need be installed."""
    words = "import sys; sys.modules['accelerate'] = sys.modules['trl'] = None; import gpu_ranks, gpu_rows"
    subprocess.run([sys.executable, "-c", words], cwd=ROOT / "benchmarks", check=True)
    with pytest.raises(subprocess.CalledProcessError):  # the control
        subprocess.run([sys.executable, "-c", f"{words}, contenders"], cwd=ROOT / "benchmarks", check=True)
