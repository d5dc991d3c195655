"""Where the seconds of a step go: calls are timed from outside, and what is timed knows nothing of it.

Owns the clock and the names of a step's parts. Which calls belong to which part, its users say.
"""

import time
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

PARTS = ("data", "forward", "backward", "optimizer", "other")


class Stopwatch:
    """Splits each lap among the calls that it wraps; what is in none of them is "other".

    Attributes:
        laps: the seconds of each part, lap by lap; together they are all that passed.
    """

    def __init__(self) -> None:
        """Start."""
        self.laps: list[dict[str, float]] = []
        self.restart()

    def restart(self) -> None:
        """Begin a lap, and forget what came before."""
        self._parts: Counter[str] = Counter()
        self._inside = False
        self._start = _now()

    def lap(self) -> None:
        """End a lap; the next one begins."""
        parts, seconds = self._parts, _now() - self._start
        self.laps.append({**{part: parts[part] for part in PARTS}, "other": seconds - parts.total()})
        self.restart()

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Count the calls of a function as a part of the lap; a call within another one is the outer one's.

        Args:
            owner: a class or an object.
            name: of its function.
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
    """Have something done whenever a call of a function has returned."""
    function = getattr(owner, name)

    @wraps(function)
    def followed(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        then()
        return result

    setattr(owner, name, followed)


def _now() -> float:
    """Tell the time at which all that was asked for is done: a CPU's calls return then, a GPU's long before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
