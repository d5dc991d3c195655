"""The tests that are marked `gpu`, for `gpu.py`."""

from pathlib import Path

import pytest
from gpu_findings import Findings

ROOT = Path(__file__).resolve().parents[1]


class Watch:
    """Notes each test's outcome as it comes, and ends the session when time is up."""

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self.seconds: dict[str, float] = {}
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Note what is still to come: what remains has had no time."""
        self.findings.left_out = [item.nodeid for item in items if item.get_closest_marker("gpu")]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note an outcome; a test that fails while it is set up has failed."""
        name = report.nodeid
        self.seconds[name] = self.seconds.get(name, 0.0) + report.duration
        if report.failed:
            self.counts["failed"] += 1
            self.findings.fail(f"{name}: {_last_line(report)}")
        elif report.skipped or report.when == "call":
            self.counts[report.outcome] += 1
        if report.when == "teardown":
            self.findings.left_out.remove(name)
            self.show()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Begin no other test when time is up."""
        if self.findings.seconds_left < max(self.seconds.values(), default=0.0):
            pytest.exit("there is no more time", returncode=0)

    def show(self) -> None:
        """Put the table as it is now."""
        longest = sorted(self.seconds.items(), key=lambda item: -item[1])[:3]
        slow = "; ".join(f"{name.rpartition('::')[2]} {seconds:.1f} s" for name, seconds in longest)
        self.findings.tables["Outcomes"] = [{**self.counts, "longest": slow}]
        self.findings.save()


def run(findings: Findings) -> None:
    """Run the tests one by one in this process, as they share one card.

    On the emulated device one file is enough: `make emulated` runs them all.
    """
    plugins = ["-p", "emulated_cuda.plugin"] if findings.is_emulated else []
    words = ["-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", f"--rootdir={ROOT}"]
    files = [file for file in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.gpu" in file.read_text("utf-8")]
    if findings.is_emulated:
        files = [file for file in files if file.parent.name == "optim"]
        findings.note("Of the tests only those of one file; `make emulated` runs them all.")
    code = pytest.main([*plugins, *words, *map(str, files)], plugins=[Watch(findings)])
    findings.require(code in (0, 1), f"pytest ended with {int(code)}")  # 1: what failed has been noted


def _last_line(report: pytest.TestReport) -> str:
    lines = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
    return " ".join((lines or [report.longreprtext])[-1].removeprefix("E ").split())[:300]
