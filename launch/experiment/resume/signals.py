"""Record requests to stop training after the current step: SIGINT, SIGTERM, or the end of torchrun."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType


class Signals:
    """Record SIGINT and SIGTERM instead of Lightning, whose handler interrupts one rank and waits for the others.

    The end of the launcher counts as SIGTERM: a killed one cannot signal its processes.
    """

    def __init__(self) -> None:
        self.noted = 0
        self.alone = True
        self.parent = 0

    def catch(self, *, alone: bool) -> None:
        """Record the signals from now on.

        Args:
            alone: Whether this is the only process, which a second signal may then end at once. Several processes
                receive a signal twice, from the terminal and from torchrun.
        """
        self.alone, self.parent = alone, os.getppid()
        _handle(self._note)

    def release(self) -> None:
        """Let the signals end the process, as they do without a trainer."""
        _handle(None)

    def wanted(self) -> int:
        """Return the number of the signal to stop for; 0 for none."""
        is_orphan = not self.alone and os.getppid() != self.parent
        return self.noted or (signal.SIGTERM if is_orphan else 0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = number
        if self.alone:
            self.release()


def _handle(handler: Callable[[int, FrameType | None], None] | None) -> None:
    """Set the handler, or the system's; only the main thread can."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, handler or signal.default_int_handler)
        signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)
