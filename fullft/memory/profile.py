"""The profile: what the tracker has found, as live bytes over the tracked work."""

from dataclasses import dataclass
from typing import Any

from fullft.memory.collectives import Sent

COMPONENTS = ("parameters", "gradients", "optimizer_states", "activations", "logits", "temporaries", "other")
PHASES = ("forward", "backward", "optimizer_step", "evaluation")


@dataclass(frozen=True)
class Moment:
    """Where in the tracked work an event fell.

    Attributes:
        part: counts the marks (`forward()`, `backward()`, ...) since tracking began.
        phase: one of `PHASES`.
        layer: the decoder layer at work; -1 before the first one, the number of layers behind the last one.
    """

    part: int
    phase: str
    layer: int


@dataclass(frozen=True)
class Profile:
    """Live bytes over the tracked work.

    Attributes:
        moments: [events], where each allocation or release fell.
        totals: [events] live bytes after it.
        curves: per component, [events] its live bytes after it.
        modules_at_peak: (module, live bytes) at the peak, the largest first.
        host_bytes: the most that was kept in host memory besides.
        disk_bytes: what is kept on disk.
        sent: to other ranks by each micro-batch in turn.
    """

    moments: list[Moment]
    totals: list[int]
    curves: dict[str, list[int]]
    modules_at_peak: list[tuple[str, int]]
    host_bytes: int = 0
    disk_bytes: int = 0
    sent: tuple[Sent, ...] = ()

    @property
    def peak(self) -> int:
        """The index of the event after which most bytes were alive."""
        return max(range(len(self.totals)), key=self.totals.__getitem__)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as `memory.json` holds them, in bytes."""
        phases: dict[str, int] = {}
        for moment, total in zip(self.moments, self.totals, strict=True):
            phases[moment.phase] = max(total, phases.get(moment.phase, 0))
        return {
            "peak_bytes": self.totals[self.peak],
            "peak_phase": self.moments[self.peak].phase,
            "components": {name: max(curve) for name, curve in self.curves.items()},
            "at_peak": {name: curve[self.peak] for name, curve in self.curves.items()},
            "phases": phases,
            "host_bytes": self.host_bytes,
            "disk_bytes": self.disk_bytes,
        }
