"""Report the last step of `mistral_7b.py` next to the limit of the machine."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from mistral_7b_limit import Rates, count_seconds, flops, matrices
from mistral_7b_model import outline, tokens_per_step
from mistral_7b_phases import GB, Phase
from mistral_7b_training import results_file


@dataclass
class Row:
    """A line of the table of times.

    Attributes:
        phase: as measured.
        counted: bytes that it must read and write.
        arithmetic: least seconds of the arithmetic.
        disk: least seconds of the disk.
        overlapped: the longer of the two; of several phases, the sum.
    """

    phase: Phase = field(default_factory=Phase)
    counted: tuple[int, int] = (0, 0)
    arithmetic: float = 0.0
    disk: float = 0.0
    overlapped: float = 0.0

    def __add__(self, other: "Row") -> "Row":
        """Add two phases up."""
        a, b = self.phase, other.phase
        return Row(
            Phase(a.seconds + b.seconds, a.cpu + b.cpu, a.read + b.read, a.written + b.written),
            (self.counted[0] + other.counted[0], self.counted[1] + other.counted[1]),
            self.arithmetic + other.arithmetic,
            self.disk + other.disk,
            self.overlapped + other.overlapped,
        )


def report_time(size: str, folder: Path, rates: Rates) -> None:
    """Print the last step next to the limit.

    Args:
        size: a key of `SIZES`.
        folder: of the checkpoint. The results lie next to it.
        rates: of this machine.
    """
    model, tokens = outline(size), tokens_per_step(size)
    work, table = count_seconds(model, rates), {}
    taken = json.loads(results_file(folder).read_text())
    # Disks of virtual machines vary in speed. Where clipping, which only reads, was faster, it sets the limit.
    reading = [phases["clipping"][0] for phases in taken]
    rates = replace(rates, read=max(rates.read, *(phase["read"] / phase["seconds"] for phase in reading)))
    for name, (phase, (read, written)) in taken[-1].items():
        arithmetic = sum(work[name].values())
        disk = read / rates.read + written / rates.write
        table[name] = Row(Phase(**phase), (read, written), arithmetic, disk, max(arithmetic, disk))
    table["step"] = sum(table.values(), Row())
    products, operations = work["forward and backward"]["matrix products"], flops(matrices(model), tokens)
    print(
        f"\nBest rates of before, after and clipping: matrix products {operations / products / 1e9:.0f} GFLOP/s "
        f"({operations / 1e12:.2f} TFLOP a step);\n"
        f"disk {rates.read / GB:.2f} GB/s read, {rates.write / GB:.2f} written; in memory, million parameters/s: "
        f"update {rates.step / 1e6:.0f}, norm {rates.norm / 1e6:.0f}"
    )
    print(
        "Seconds of arithmetic: " + ", ".join(f"{what} {s:.1f}" for each in work.values() for what, s in each.items())
    )
    print(
        f"\nStep {len(taken)} ({torch.get_num_threads()} threads; GB = 10^9 bytes; in brackets, bytes that must move)"
    )
    print(f"{'':38}------- GB -------------------  -------- limit, s ---------   measured / limit")
    print(
        f"{'phase':22}{'seconds':>8}{'of CPU':>8}{'read':>15}{'written':>15}{'arithmetic':>12}{'disk':>7}{'sum':>7}"
        f"{'overlap':>9}{'sum':>8}{'overlap':>9}"
    )
    for name, row in table.items():
        total = row.arithmetic + row.disk
        read, written = (
            f"{real / GB:.1f} ({own / GB:.1f})"
            for real, own in zip((row.phase.read, row.phase.written), row.counted, strict=True)
        )
        print(
            f"{name:22}{row.phase.seconds:8.1f}{row.phase.cpu:8.1f}{read:>15}{written:>15}{row.arithmetic:12.1f}{row.disk:7.1f}{total:7.1f}"
            f"{row.overlapped:9.1f}{row.phase.seconds / total:8.2f}{row.phase.seconds / row.overlapped:9.2f}"
        )
    print(
        f"{tokens / table['step'].phase.seconds:.2f} tokens/s. Limits: arithmetic and disk in turn (sum) or at once "
        "(overlap)"
    )
