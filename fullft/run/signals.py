"""Signals: a first SIGINT, SIGTERM or SIGHUP lets the step finish and a checkpoint be saved.

A second SIGINT or SIGTERM ends at once. A signal that is ignored, as SIGHUP is under nohup, stays so. The former
handlers are restored after the loop.
"""

import os
import signal
import types
from contextlib import suppress

from fullft.errors import StoppedBySignal

_HANGUP = getattr(signal, "SIGHUP", None)  # the terminal has been closed, or the connection lost; Windows has none
_SIGNALS = [number for number in (signal.SIGINT, signal.SIGTERM, _HANGUP) if number is not None]


class StopRequest:
    """Whether the user, or the scheduler, has asked the run to stop. A context manager around the loop."""

    received: int | None = None

    def __enter__(self) -> "StopRequest":
        """Install the handlers."""
        heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._former = {number: signal.signal(number, self._receive) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the former handlers."""
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: types.FrameType | None) -> None:
        if self.received is not None:
            if number == _HANGUP:
                return  # a closing terminal sends several: the kernel one, the shell another
            raise StoppedBySignal("stopped at once; the checkpoints saved so far are intact", number)
        self.received = number
        # Past Python's buffers: one of them may be what the signal interrupted.
        name = signal.Signals(number).name
        with suppress(OSError):  # the terminal may be gone
            os.write(2, f"\n{name}: finishing the step and saving a checkpoint; a second one ends at once\n".encode())

    def end_run_if_asked(self, step: int) -> None:
        """End the run if a signal has asked for it.

        Args:
            step: the last finished step, whose checkpoint has been saved.

        Raises:
            StoppedBySignal: with the exit code 128 + signal.
        """
        if self.received is None:
            return
        name = signal.Signals(self.received).name
        raise StoppedBySignal(
            f"stopped by {name} after step {step}; the same command with --resume_from_checkpoint continues",
            self.received,
        )
