"""Stopping a run from outside: finish the step, write a checkpoint, say so, exit as the signal asks."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

__all__ = ["StopSignals", "TrainingInterrupted", "signals_raise"]


class TrainingInterrupted(RuntimeError):
    """A signal ended the run after a checkpoint was written.

    ``exit_code`` is what a shell reports for a process that this signal ended: 130 for SIGINT (Ctrl-C), 143 for
    SIGTERM, 129 for SIGHUP.

    Example:
        >>> import signal
        >>> from pyflowkern.train import TrainingInterrupted
        >>> stopped = TrainingInterrupted(signal.SIGTERM, 20, "out/digits")
        >>> print(stopped)
        stopped by SIGTERM after step 20; go on with: pyflowkern train --resume out/digits
        >>> stopped.exit_code
        143
    """

    def __init__(self, number: signal.Signals, step: int, out: str) -> None:
        super().__init__(
            f"stopped by {number.name} after step {step}; go on with: pyflowkern train --resume {out}"
        )
        self.exit_code = 128 + number


class StopSignals:
    """Remember that SIGINT, SIGTERM or SIGHUP came, for the trainer to look at between two steps.

    The first signal is remembered; a second one ends the process at once.  A signal that the caller ignores stays
    ignored, as ``nohup`` wants it.  Threads other than the main one cannot have handlers: there nothing changes.

    Processes that train together stop after the same step: a signal counts once all have heard of it.

    Args:
        together: Whether there are several processes.
    """

    _NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, *, together: bool = False) -> None:
        self.received: signal.Signals | None = None
        self._together = together
        self._heard: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def wanted(self) -> signal.Signals | None:
        """The signal after which the run is to stop: in several processes the one that all have heard of."""
        return self._heard if self._together else self.received

    def counts(self) -> list[float]:
        """Return 1 for the signal that came and 0 for others, to be added up over all processes."""
        return [float(self.received is number) for number in self._NUMBERS]

    def hear(self, counts: list[float]) -> None:
        """Take the sums over all processes."""
        came = (number for number, n in zip(self._NUMBERS, counts, strict=True) if n)
        self._heard = self._heard or next(came, None)

    def install(self) -> None:
        """Take the signals over from whoever has them; called again, from who took them since."""
        if self.received or threading.current_thread() is not threading.main_thread():
            return
        for number in self._NUMBERS:
            current = signal.getsignal(number)
            if current not in (signal.SIG_IGN, None):
                self._before.setdefault(number, current)
                signal.signal(number, self._remember)

    def restore(self) -> None:
        """Give the signals back."""
        while self._before:
            signal.signal(*self._before.popitem())

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)


@contextmanager
def signals_raise() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise SystemExit in the block, so that it removes what it has begun.

    Ctrl-C raises KeyboardInterrupt anyway.  A signal that the caller ignores or handles stays as it is, and threads
    other than the main one cannot have handlers.
    """

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    taken = []
    if threading.current_thread() is threading.main_thread():
        wanted = (signal.SIGTERM, signal.SIGHUP)
        taken = [number for number in wanted if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
