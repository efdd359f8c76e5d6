"""Training progress between two optimizer steps, as the counters of Lightning's loops in its checkpoints."""

from __future__ import annotations

from typing import Any

import lightning as L

from experiment.resume.progress import Progress


def begin_epoch(trainer: L.Trainer) -> None:
    """Begin an epoch as one that follows another: with `max_steps`, Lightning would take it for begun."""
    trainer.fit_loop._restarting = False
    trainer.fit_loop.epoch_loop.restarting = False


def write_place(loops: dict[str, Any], place: Progress, trainer: L.Trainer) -> None:
    """Write the training progress as Lightning's counters, those of `on_train_batch_end`, from where it resumes right.

    | counter (e epochs, s steps, b batches of this epoch done) | within an epoch | at its end |
    |---|---|---|
    | epoch_progress: ready, started | e + 1 | e |
    | epoch_progress: processed, completed | e | e |
    | batch_progress: ready, started, processed | b | 0 |
    | batch_progress: completed | b - 1 | 0 |
    | _batches_that_stepped | s - 1 | s |

    Validations count as 0: Lightning asks only whether one was interrupted, and would count that of now twice.
    """
    is_over = trainer.max_steps != -1 and place.step >= trainer.max_steps  # which ends a begun epoch
    batches, begun = place.batch_of_epoch, int(place.step_of_epoch > 0 and not is_over)
    epoch = place.epoch + int(place.step_of_epoch > 0 and is_over)
    per_step = 1 if place.simulate else place.plan.accumulate
    loops["epoch_progress"] = _progress(epoch, begun, begun, 0, 0)
    loops["epoch_loop.batch_progress"] = {
        "total": _counts(place.step * per_step, 0, 0, 0, -begun),
        "current": _counts(batches, 0, 0, 0, -begun),
        "is_last_batch": False,
    }
    loops["epoch_loop.state_dict"] = {"_batches_that_stepped": place.step - begun}
    loops["epoch_loop.val_loop.batch_progress"] = {**_progress(0, 0, 0, 0, 0), "is_last_batch": False}
    optimizer = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    for name in ("step", "zero_grad"):
        optimizer[name]["total"].update(dict.fromkeys(optimizer[name]["total"], place.step))
        optimizer[name]["current"].update(dict.fromkeys(optimizer[name]["current"], place.step_of_epoch))


def _progress(done: int, ready: int, started: int, processed: int, completed: int) -> dict[str, Any]:
    counts = _counts(done, ready, started, processed, completed)
    return {"total": counts, "current": dict(counts)}


def _counts(done: int, ready: int, started: int, processed: int, completed: int) -> dict[str, int]:
    names = ("ready", "started", "processed", "completed")
    return {name: done + more for name, more in zip(names, (ready, started, processed, completed), strict=True)}
