"""The two ways in which a command ends early: a reason for the user, or a signal from the user."""

import difflib
import signal
from collections.abc import Sequence
from types import FrameType


class DistillError(Exception):
    """A reason to stop that is printed to the user as one line, without a traceback."""


class NotFinite(DistillError):
    """A model has come to NaN or infinity."""


def nearest(name: str, names: Sequence[str]) -> str:
    """For the end of a message about a name that there is not: the one that may be meant."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""


class Interrupted(Exception):
    """A signal asked for a stop and everything that has to be kept is on disk."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Interrupt:
    """Turns SIGINT and SIGTERM into a request that is honoured between two steps.

    Used as a context manager. A second SIGINT stops at once, as Python does by default; what is
    on disk is whole even then, because every file is replaced in one move.
    """

    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested: int | None = None

    def __enter__(self) -> "Interrupt":
        self._before = {number: signal.signal(number, self._handle) for number in self.signals}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.requested is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signum

    def check(self) -> None:
        """Raise `Interrupted` if a signal has arrived."""
        if self.requested is not None:
            raise Interrupted(self.requested)
