"""The picture of a step's memory: a stacked area over its timeline, one colour per component.

It draws a profile of the tracker's, and measures nothing itself.
"""

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from fullft.memory.profile import COMPONENTS, Profile
from fullft.memory.units import GIB, unit_for

# From what stays (cool, calm) to what comes and goes (warm). Source of the tones: ColorBrewer, "Paired".
_COLOURS = {
    "parameters": "#1f5a99",
    "optimizer_states": "#7fb2d9",
    "gradients": "#4c9a4c",
    "activations": "#f2a541",
    "logits": "#d9602b",
    "temporaries": "#a892c7",
    "other": "#9a9a9a",
}
_PHASE_NAMES = {"forward": "forward", "backward": "backward", "optimizer_step": "step", "evaluation": "evaluation"}
_MAX_POINTS = 700  # a peak that lasts for one event is then as wide as a pixel or two
_SMALLEST_SHOWN = 1e-3  # of the peak
_FARTHEST_LIMIT = 1.6  # times the peak: a limit above that would squeeze the picture into its lower half

Array = np.ndarray[Any, Any]


def plot_memory(profile: Profile, file: Path, title: str, limit_bytes: int | None = None) -> None:
    """Draw the live bytes over a step.

    Args:
        profile: from `take_worst_step`.
        file: the PNG to write.
        title: above the axes.
        limit_bytes: of the card; drawn as a dashed line where it is not far above the peak, else named in words.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    unit = unit_for(profile.totals[profile.peak])
    factor = unit.size
    events = _sample(profile)
    names = _shown(profile)
    figure, axes = pyplot.subplots(figsize=(10, 5.4), layout="constrained")
    # A bar until the next event, not a slope: memory is taken and given back at once.
    axes.stackplot(
        np.arange(len(events)),
        [np.array(profile.curves[name])[events] / factor for name in names],
        labels=[name.replace("_", " ") for name in names],
        colors=[_COLOURS[name] for name in names],
        step="post",
        linewidth=0,
    )
    peak = profile.totals[profile.peak] / factor
    top = max(peak * 1.3, (limit_bytes or 0) / factor * 1.05 if _is_near(profile, limit_bytes) else 0)
    axes.set_xlim(0, len(events) - 1)
    axes.set_ylim(0, top)
    _mark_phases(axes, profile, events, top)
    _mark_peak(axes, profile, events, peak, factor, unit.name)
    _mark_limit(axes, profile, limit_bytes, factor)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_ylabel(f"live tensors ({unit.name})")
    axes.set_xticks([])
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    # In the order of the stack, from top to bottom.
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def _shown(profile: Profile) -> list[str]:
    """Name the components from the bottom of the stack to its top; what is too small to be seen is left out."""
    order = ("parameters", "optimizer_states", "gradients", "activations", "logits", "temporaries", "other")
    assert set(order) == set(COMPONENTS)
    least = _SMALLEST_SHOWN * profile.totals[profile.peak]
    return [name for name in order if max(profile.curves[name]) > least]


def _sample(profile: Profile) -> Array:
    """Choose events: of each stretch of the timeline its largest, so that no peak is lost.

    Part 0, from before the step, is left out: the first event of the step includes what was there.
    """
    first = next((event for event, moment in enumerate(profile.moments) if moment.part > 0), 0)
    events = np.arange(first, len(profile.totals))
    if len(events) <= _MAX_POINTS:
        return events
    totals = np.array(profile.totals)
    return np.array([stretch[np.argmax(totals[stretch])] for stretch in np.array_split(events, _MAX_POINTS)])


def _is_near(profile: Profile, limit_bytes: int | None) -> bool:
    return limit_bytes is not None and limit_bytes <= _FARTHEST_LIMIT * profile.totals[profile.peak]


def _mark_phases(axes: Any, profile: Profile, events: Array, top: float) -> None:
    moments = [(index, profile.moments[event]) for index, event in enumerate(events)]
    parts = [list(part) for _, part in groupby(moments, key=lambda pair: pair[1].part)]
    several = sum(part[0][1].phase == "forward" for part in parts) > 1
    number = 0
    for part in parts:
        first, last, phase = part[0][0], part[-1][0] + 1, part[0][1].phase
        number += phase == "forward"
        if first:
            axes.axvline(first, color="black", alpha=0.25, linewidth=0.8, linestyle=(0, (2, 2)))
        name = _PHASE_NAMES[phase]
        if several and phase in ("forward", "backward"):
            name += f"\nmicro-batch {number}"
        narrow = (last - first) / len(events) < 0.07
        axes.text(
            (first + last) / 2,
            -0.02 * top,
            name,
            ha="right" if narrow else "center",
            va="top",
            rotation=35 if narrow else 0,
            rotation_mode="anchor" if narrow else "default",
            fontsize=9,
        )


def _mark_peak(axes: Any, profile: Profile, events: Array, peak: float, factor: int, unit: str) -> None:
    event = profile.peak
    place = int(np.searchsorted(events, event))
    sizes = sorted(((curve[event] / factor, name) for name, curve in profile.curves.items()), reverse=True)
    words = [f"{name.replace('_', ' ')} {_digits(size)}" for size, name in sizes if size >= 0.005 * peak]
    half = (len(words) + 1) // 2
    composition = " + ".join(words) if len(words) <= 3 else " + ".join(words[:half]) + "\n+ " + " + ".join(words[half:])
    on_the_left = place < len(events) / 2
    axes.plot([place], [peak], "o", color="black", markersize=6, zorder=5)
    axes.annotate(
        f"peak {_digits(peak)} {unit}, in {_PHASE_NAMES[profile.moments[event].phase]}\n{composition}",
        (place, peak),
        xytext=(10 if on_the_left else -10, 10),
        textcoords="offset points",
        ha="left" if on_the_left else "right",
        va="bottom",
        fontsize=9,
        bbox={"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
        zorder=6,
    )


def _mark_limit(axes: Any, profile: Profile, limit_bytes: int | None, factor: int) -> None:
    if limit_bytes is None:
        return
    text = f"the device's memory: {limit_bytes / GIB.size:.4g} GiB"
    if _is_near(profile, limit_bytes):
        axes.axhline(limit_bytes / factor, color="#b00020", linestyle="--", linewidth=1.3)
        axes.text(2, limit_bytes / factor, text, color="#b00020", fontsize=9, va="bottom")
    else:
        axes.text(0.995, 0.995, f"{text}, far above", transform=axes.transAxes, ha="right", va="top", fontsize=9)


def _digits(size: float) -> str:
    return f"{size:.2f}" if size < 100 else f"{size:.0f}"
