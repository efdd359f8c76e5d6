"""The side of a run that a comparison started: report its progress, and end when the comparison ends."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L

VARIABLE = "SYNCBN_PROGRESS"  # set by the comparison: path of the progress file


def follow(callbacks: list[L.Callback]) -> None:
    """If a comparison started this process, report progress to it, and exit as soon as it ends."""
    if VARIABLE in os.environ:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
        callbacks.append(ProgressReport(Path(os.environ[VARIABLE])))


def _end_with_stdin() -> None:
    """Exit at the end of standard input: the comparison holds the other end, which closes even when it is killed."""
    while os.read(0, 1):  # not sys.stdin, whose lock would be held when the interpreter ends
        pass
    os._exit(1)


class ProgressReport(L.Callback):
    """Write the fraction of training that is done, at most twice a second."""

    def __init__(self, path: Path) -> None:
        self.path, self.written = path, 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Write."""
        now = time.monotonic()
        if trainer.is_global_zero and now > self.written + 0.5:
            self.path.write_text(f"{trainer.global_step / max(1, trainer.estimated_stepping_batches):.4f}")
            self.written = now
