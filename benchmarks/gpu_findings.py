"""What a part of `gpu.py` has found: tables, notes, failures and what was left out, saved whenever something is added.

A part that is stopped half-way leaves what it has found so far.
"""

import gc
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # the heads of its columns, with units, and numbers or words
GIB = 2**30


@dataclass
class Findings:
    """Of one part.

    Attributes:
        file: to save them in, as JSON.
        seconds: that the part may take.
        is_emulated: whether it runs on the emulated device, at toy size.
        tables: rows, under their tables' titles.
        notes: sentences for the page.
        left_out: what there was no time for.
        failed: what went wrong, as lines.
        skipped: why the whole part was.
    """

    file: Path
    seconds: float
    is_emulated: bool
    tables: dict[str, list[Row]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    skipped: str = ""

    def __post_init__(self) -> None:
        self._end = time.monotonic() + self.seconds

    @property
    def seconds_left(self) -> float:
        """What is left of the time."""
        return self._end - time.monotonic()

    def add(self, table: str, row: Row) -> None:
        """Add a row to a table, which begins with its first one."""
        self.tables.setdefault(table, []).append(row)
        print(table, row, flush=True)
        self.save()

    def note(self, sentence: str) -> None:
        """Add a sentence."""
        self.notes.append(sentence)
        self.save()

    def fail(self, line: str) -> None:
        """Say what went wrong."""
        self.failed.append(line)
        self.save()

    def require(self, holds: bool, line: str) -> None:
        """Say what is wrong, unless it holds."""
        if not holds:
            self.fail(line)

    def skip(self, why: str) -> None:
        """Say why the whole part is not carried out."""
        self.skipped = why
        self.save()

    def carry_out(self, cases: Mapping[str, Callable[[], object]]) -> None:
        """Carry out cases one after the other, as long as there is time for one like the longest so far.

        Args:
            cases: under the names that failures and omissions are reported with. One that fails leaves the others, and
                so does one whose process was ended when time was up.
        """
        names, longest = list(cases), 0.0
        for number, name in enumerate(names):
            if self.seconds_left < longest:
                self.left_out += names[number:]
                break
            started = time.monotonic()
            try:
                cases[name]()
            except subprocess.TimeoutExpired:
                self.left_out.append(name)
            except (Exception, SystemExit) as error:
                traceback.print_exc()
                self.fail(f"{name}: {_in_one_line(error)}")
            _free_memory()
            longest = max(longest, time.monotonic() - started)
        self.save()

    def save(self) -> None:
        """Write the file anew."""
        words = ("tables", "notes", "left_out", "failed", "skipped")
        staging = self.file.with_suffix(".tmp")
        staging.write_text(json.dumps({word: getattr(self, word) for word in words}, indent=1), encoding="utf-8")
        staging.replace(self.file)


def _in_one_line(error: BaseException) -> str:
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:300]}"


def _free_memory() -> None:
    """Give a device's memory back, which the next case may need in other sizes."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def as_markdown(rows: list[Row]) -> str:
    """Return a table. Its columns are those of all rows, in the order in which they first appear.

    Args:
        rows: at least one.
    """
    heads = list(dict.fromkeys(head for row in rows for head in row))
    are_numbers = [all(isinstance(row.get(head, 0), int | float) for row in rows) for head in heads]
    lines = [heads, ["---:" if is_number else "---" for is_number in are_numbers]]
    lines += [[_cell(row.get(head, "")) for head in heads] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "\\|")
