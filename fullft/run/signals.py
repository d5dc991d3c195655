"""Signals: a first SIGINT, SIGTERM or SIGHUP lets the step finish and a checkpoint be saved.

A second SIGINT or SIGTERM ends at once. A signal that is ignored, as SIGHUP is under nohup, stays so. The former
handlers are restored after the loop. A signal to one of several ranks is enough: all stop at the same step.
"""

import os
import signal
import types
from collections.abc import Sequence
from contextlib import suppress

from fullft.config.ranks import find_place
from fullft.errors import StoppedBySignal
from fullft.run.ending import is_ending

_HANGUP = getattr(signal, "SIGHUP", None)  # the terminal has been closed, or the connection lost; Windows has none
SIGNALS = [number for number in (signal.SIGINT, signal.SIGTERM, _HANGUP) if number is not None]


def is_second(number: int, earlier: Sequence[int]) -> bool:
    """Return whether a signal, after earlier ones, asks to end at once.

    Args:
        number: of the signal. A closing terminal sends several hangups: the kernel one, the shell another.
        earlier: the signals received before.
    """
    return bool(earlier) and number != _HANGUP


class StopRequest:
    """Whether the user, or the scheduler, has asked the run to stop. A context manager around the loop."""

    received: int | None = None
    _agreed: int | None = None  # what all ranks know of

    def __enter__(self) -> "StopRequest":
        """Install the handlers."""
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._former = {number: signal.signal(number, self._receive) for number in heard}
        self._has_spoken = find_place().rank != 0
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the former handlers."""
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: types.FrameType | None) -> None:
        if is_ending():
            return  # torchrun sends one to the ranks that are left when one has failed
        if self.received is not None:
            if is_second(number, [self.received]):
                raise StoppedBySignal("stopped at once; the checkpoints saved so far are intact", number)
            return
        self.received = number
        self._speak(number)

    def _speak(self, number: int) -> None:
        """Say once, on the first rank alone, what is about to happen."""
        if self._has_spoken:
            return
        self._has_spoken = True
        # Past Python's buffers: one of them may be what the signal interrupted.
        name = signal.Signals(number).name
        with suppress(OSError):  # the terminal may be gone
            os.write(2, f"\n{name}: finishing the step and saving a checkpoint; a second one ends at once\n".encode())

    def was_asked(self) -> bool:
        """Return whether any rank has got a signal by now: the same on all ranks, which must all call this together."""
        from fullft.ranks import max_over_ranks  # which imports torch, as the launcher does not

        if self._agreed is None:
            self._agreed = max_over_ranks(self.received or 0) or None
            if self._agreed is not None:
                self._speak(self._agreed)
        return self._agreed is not None

    def end_run_if_asked(self, step: int) -> None:
        """End the run, on all ranks together, if a signal has asked for it.

        Args:
            step: the last finished step, whose checkpoint has been saved.

        Raises:
            StoppedBySignal: with the exit code 128 + signal.
        """
        if not self.was_asked() or self._agreed is None:
            return
        name = signal.Signals(self._agreed).name
        raise StoppedBySignal(
            f"stopped by {name} after step {step}; the same command with --resume_from_checkpoint continues",
            self._agreed,
        )
