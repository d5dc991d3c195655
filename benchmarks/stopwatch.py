"""Split the seconds of a step among its parts. Calls are timed from outside, and the timed code does not know of it.

The clock and the names of the parts are here. Which calls belong to which part is decided by the users of this module.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

PARTS = ("data", "forward", "backward", "optimizer", "other")


class Stopwatch:
    """Splits each lap among the calls that it wraps. Time outside of them is "other".

    Attributes:
        laps: the seconds of each part, lap by lap. A lap's parts add up to all of its time.
    """

    def __init__(self) -> None:
        self.laps: list[dict[str, float]] = []
        self.restart()

    def restart(self) -> None:
        """Begin a lap, and drop the time since the last one."""
        self._parts: dict[str, float] = defaultdict(float)
        self._inside = False
        self._start = _now()

    def lap(self) -> None:
        """End a lap; the next one begins."""
        parts, seconds = self._parts, _now() - self._start
        self.laps.append({**{part: parts[part] for part in PARTS}, "other": seconds - sum(parts.values())})
        self.restart()

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Count the calls of a function as a part of the lap. A call within another one belongs to the outer one.

        Args:
            owner: a class or an object.
            name: its function's.
            part: one of `PARTS`.
        """
        function = getattr(owner, name)

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside, start = True, _now()
            try:
                return function(*args, **kwargs)
            finally:
                self._parts[part] += _now() - start
                self._inside = False

        setattr(owner, name, timed)


def after(owner: Any, name: str, then: Callable[[], Any]) -> None:
    """Call `then` whenever a call of a function has returned."""
    function = getattr(owner, name)

    @wraps(function)
    def followed(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        then()
        return result

    setattr(owner, name, followed)


def _now() -> float:
    """Wait until all work is done, and return the time. A GPU's calls return long before that."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
