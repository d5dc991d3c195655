"""Signals: a first SIGINT or SIGTERM lets the step finish and a checkpoint be saved; a second one ends at once.

The former handlers are restored after the loop.
"""

import os
import signal
import types

from fullft.errors import StoppedBySignal

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether the user, or the scheduler, has asked the run to stop. A context manager around the loop."""

    received: int | None = None

    def __enter__(self) -> "StopRequest":
        """Install the handlers."""
        self._former = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the former handlers."""
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: types.FrameType | None) -> None:
        if self.received is not None:
            raise StoppedBySignal("stopped at once; the checkpoints saved so far are intact", number)
        self.received = number
        # Past Python's buffers: one of them may be what the signal interrupted.
        name = signal.Signals(number).name
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
