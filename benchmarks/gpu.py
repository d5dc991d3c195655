"""Try everything that needs a card, on the card at hand, and write one page: tests, races, memory, speed, a 7B model.

    make gpu                                        # or, in an environment that has torch for CUDA:
    python benchmarks/gpu.py                        # eight minutes on a large card; no hub
    python benchmarks/gpu.py --only memory --minutes 2
    PYTHONPATH=tests python benchmarks/gpu.py --emulated    # without a card, at toy size: does it run at all?

It writes `benchmarks/work/gpu/gpu-<card>.md` and the same figures as JSON. Each part runs in a process of its own, and
those that matter most come first. A part that fails, hangs or runs out of memory leaves the others. Time that one does
not need goes to those after it, and what there was no time for is said on the page. It ends with 1 if anything failed.
Prints what failed last.
"""

import argparse
import copy
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from gpu_findings import Findings, Row, as_markdown

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "benchmarks" / "work" / "gpu"
GRACE = 10  # seconds that a part may be late before it is stopped
LEAST = 5  # seconds that a part needs to find anything
NOTHING: Row = {"tables": {}, "notes": [], "left_out": [], "failed": [], "skipped": ""}  # the fields of `Findings`
LAST_LINES = 15  # of the output of a part that ended by itself


@dataclass(frozen=True)
class Part:
    """Something that one process finds out.

    Attributes:
        title: on the page.
        module: has a function `run`, which gets the `Findings`.
        share: of the time, relative to the other parts.
        environment: of the process, on a card.
    """

    title: str
    module: str
    share: float
    environment: dict[str, str] = field(default_factory=dict)


# The most important ones first.
PARTS = {
    "tests": Part("Tests that need a GPU", "gpu_tests", 80),
    "matrix": Part("Runs under torch's sanitizer", "gpu_matrix", 100, {"TORCH_CUDA_SANITIZER": "1"}),
    "memory": Part("Memory, planned and measured", "gpu_memory", 45),
    "time": Part("Time of a step, estimated and measured", "gpu_time", 50),
    "peers": Part("Speed, next to Trainer and TRL", "gpu_peers", 110),
    "kernels": Part("Attention, the optimizer's step and compilation", "gpu_kernels", 60),
    "7b": Part("A model of 7B parameters in 24 GiB", "gpu_7b", 70),
    "ranks": Part("Two ranks over NCCL", "gpu_ranks", 30),
}
MACHINE = "machine"  # what there is; not a part of the page's body


def main() -> None:
    """Carry out the parts one after the other, and write page and JSON."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=8, help="that all parts may take together (8)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts (default: all)")
    parser.add_argument("--emulated", action="store_true", help="run at toy size on the emulated device of the tests")
    parser.add_argument("--work", type=Path, default=WORK, help="folder to write to (default: benchmarks/work/gpu)")
    for hidden in ("--part", "--seconds", "--arguments"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        return run_part(arguments)
    sys.exit(carry_out(arguments))


# ---------------------------------------------------------------------------------------------- one part


def run_part(arguments: argparse.Namespace) -> None:
    """Carry out a part in this process.

    Args:
        arguments: the command line's, with the hidden ones.
    """
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    from fullft.run.environment import use_expandable_segments

    use_expandable_segments()  # as `train.py` does, before torch is imported
    if arguments.emulated:
        from emulated_cuda.load import load

        load()  # before torch is imported
    findings = Findings(
        arguments.work / "parts" / f"{arguments.part}.json", float(arguments.seconds), arguments.emulated
    )
    findings.save()
    module = "gpu_machine" if arguments.part == MACHINE else PARTS[arguments.part].module
    given = json.loads(arguments.arguments or "{}")
    importlib.import_module(module).run(findings, **given)
    findings.save()


def in_own_process(name: str, seconds: float, arguments: argparse.Namespace) -> Row:
    """Carry out a part in a process of its own, and read what it has found.

    Args:
        name: of the part.
        seconds: that it may take.
        arguments: the command line's.

    Returns:
        The fields of its `Findings`, with `seconds` that it took.
    """
    folder = arguments.work / "parts"
    command = [sys.executable, __file__, "--part", name, "--seconds", f"{seconds:.0f}", "--work", str(arguments.work)]
    command += ["--emulated"] if arguments.emulated else []
    environment = PARTS[name].environment if name in PARTS and not arguments.emulated else {}
    file, log = folder / f"{name}.json", folder / f"{name}.log"
    file.unlink(missing_ok=True)
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(seconds + GRACE)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _stop(process)
    found: Row = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else copy.deepcopy(NOTHING)
    if code is None:
        found["failed"].append(f"stopped after {seconds + GRACE:.0f} s; the last lines are in {log}")
    elif code:
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        found["failed"].append(f"ended with {code}: " + " / ".join(filter(None, last))[-600:])
    return found | {"seconds": time.monotonic() - started}


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End a part and all that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


# ---------------------------------------------------------------------------------------------- all parts


def carry_out(arguments: argparse.Namespace) -> int:
    """Carry out all parts, and return the exit code.

    Args:
        arguments: the command line's.
    """
    end = time.monotonic() + 60 * arguments.minutes
    arguments.work = arguments.work.absolute()
    (arguments.work / "parts").mkdir(parents=True, exist_ok=True)
    machine = in_own_process(MACHINE, 60, arguments)
    if machine["failed"] or machine["skipped"]:
        print("\n".join([machine["skipped"], *machine["failed"]]).strip(), file=sys.stderr)
        return 1
    facts: Row = machine["tables"]["machine"][0]
    found: dict[str, Row] = {}
    names = [name for name in PARTS if name in arguments.only]
    for number, name in enumerate(names):
        shares = [PARTS[each].share for each in names[number:]]
        seconds = (end - time.monotonic()) * shares[0] / sum(shares) - GRACE / 2
        print(f"{PARTS[name].title}: at most {max(0.0, seconds):.0f} s", flush=True)
        if seconds < LEAST:
            found[name] = NOTHING | {"skipped": "there was no time", "seconds": 0.0}
        else:
            found[name] = in_own_process(name, seconds, arguments)
        print(f"  {_outcome(found[name])} in {found[name]['seconds']:.0f} s", flush=True)
        page = write(arguments, facts, found)
    failures = [f"{name}: {line}" for name, each in found.items() for line in each["failed"]]
    print(f"\nWritten: {page} and {page.with_suffix('.json').name}")
    print(f"To publish it, copy the page to docs/benchmarks/{page.name} and list it in mkdocs.yml.")
    if not failures:
        print("Nothing failed.")
        return 0
    print(f"\n{len(failures)} failed:", *failures, sep="\n  ")
    return 1


def _outcome(found: Row) -> str:
    if found["skipped"]:
        return f"skipped: {found['skipped']}"
    words = [f"{len(found['failed'])} failed"] if found["failed"] else ["done"]
    words += [f"{len(found['left_out'])} left out"] if found["left_out"] else []
    return ", ".join(words)


# ---------------------------------------------------------------------------------------------- the page


def write(arguments: argparse.Namespace, facts: Row, found: dict[str, Row]) -> Path:
    """Write page and JSON, and return the page's path.

    Args:
        arguments: the command line's.
        facts: of the machine.
        found: so far, part by part.
    """
    name = re.sub(r"[^a-z0-9]+", "-", facts["card"].lower()).strip("-")
    page: Path = arguments.work / f"gpu-{name}.md"
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    command = f"python benchmarks/gpu.py --minutes {arguments.minutes:g}" + " --emulated" * arguments.emulated
    page.write_text(as_page(facts | {"date": date, "command": f"`{command}`"}, found), encoding="utf-8")
    content: dict[str, Any] = {"date": date, "command": command, "machine": facts, "parts": found}
    page.with_suffix(".json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return page


def as_page(facts: Row, found: dict[str, Row]) -> str:
    """Return the page.

    Args:
        facts: of the machine and of the run.
        found: part by part.
    """
    failures = [f"- {PARTS[name].title}: {line}" for name, each in found.items() for line in each["failed"]]
    lines = [f"# On {facts['card']}", "", as_markdown([{"": name, "value": value} for name, value in facts.items()])]
    if facts["card"].endswith("(emulated)"):
        lines += ["", "At toy size, on an emulated device: this shows that all runs, and its speeds mean nothing."]
    lines += ["", "## What failed", "", *(failures or ["Nothing."])]
    for name, each in found.items():
        lines += ["", f"## {PARTS[name].title}", "", f"{_outcome(each).capitalize()}, in {each['seconds']:.0f} s."]
        lines += [line for sentence in each["notes"] for line in ("", sentence)]
        for title, rows in each["tables"].items():
            lines += ["", f"### {title}", "", as_markdown(rows)]
        if each["left_out"]:
            lines += ["", f"There was no time for: {', '.join(each['left_out'])}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
