"""What a run does for the comparison that started it: tell how far it is, and end when the comparison ends."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L

VARIABLE = "SYNCBN_PROGRESS"  # set by the comparison: the file for the progress


def follow(callbacks: list[L.Callback]) -> None:
    """If a comparison started this process, join it: report progress, and end as soon as it is gone."""
    if VARIABLE in os.environ:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
        callbacks.append(ProgressReport(Path(os.environ[VARIABLE])))


def _end_with_stdin() -> None:
    """Wait for the end of the standard input: the comparison holds its other end, and loses it even by a SIGKILL."""
    while os.read(0, 1):  # not sys.stdin, whose lock would be held when the interpreter ends
        pass
    os._exit(1)


class ProgressReport(L.Callback):
    """Write the fraction of the training that is done, about twice a second."""

    def __init__(self, path: Path) -> None:
        self.path, self.written = path, 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Write."""
        now = time.monotonic()
        if trainer.is_global_zero and now > self.written + 0.5:
            self.path.write_text(f"{trainer.global_step / max(1, trainer.estimated_stepping_batches):.4f}")
            self.written = now
