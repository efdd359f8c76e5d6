"""Training progress as the counters of Lightning's loops, which its checkpoints hold."""

from typing import Any

import lightning as L

from experiment.resume.progress import Progress


def begin_epoch(trainer: L.Trainer) -> None:
    """Mark the next epoch as not started: with `max_steps`, Lightning would take it for a started one."""
    trainer.fit_loop._restarting = False
    trainer.fit_loop.epoch_loop.restarting = False


def write_progress(loops: dict[str, Any], progress: Progress, trainer: L.Trainer) -> None:
    """Write the progress as Lightning's counters have it in `on_train_batch_end`, from which it resumes correctly.

    | counter (e epochs, s steps, b batches of this epoch done) | within an epoch | at its end |
    |---|---|---|
    | epoch_progress: ready, started | e + 1 | e |
    | epoch_progress: processed, completed | e | e |
    | batch_progress: ready, started, processed | b | 0 |
    | batch_progress: completed | b - 1 | 0 |
    | _batches_that_stepped | s - 1 | s |

    Validations count as 0: Lightning only asks whether one was interrupted, and would count the present one twice.
    """
    is_over = trainer.max_steps != -1 and progress.step >= trainer.max_steps  # which ends a begun epoch
    batches, begun = progress.batch_of_epoch, int(progress.step_of_epoch > 0 and not is_over)
    epoch = progress.epoch + int(progress.step_of_epoch > 0 and is_over)
    per_step = 1 if progress.simulate else progress.plan.accumulate
    loops["epoch_progress"] = _progress(epoch, begun, begun, 0, 0)
    loops["epoch_loop.batch_progress"] = {
        "total": _counts(progress.step * per_step, 0, 0, 0, -begun),
        "current": _counts(batches, 0, 0, 0, -begun),
        "is_last_batch": False,
    }
    loops["epoch_loop.state_dict"] = {"_batches_that_stepped": progress.step - begun}
    loops["epoch_loop.val_loop.batch_progress"] = {**_progress(0, 0, 0, 0, 0), "is_last_batch": False}
    optimizer = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    for name in ("step", "zero_grad"):
        optimizer[name]["total"].update(dict.fromkeys(optimizer[name]["total"], progress.step))
        optimizer[name]["current"].update(dict.fromkeys(optimizer[name]["current"], progress.step_of_epoch))


def _progress(done: int, ready: int, started: int, processed: int, completed: int) -> dict[str, Any]:
    counts = _counts(done, ready, started, processed, completed)
    return {"total": counts, "current": dict(counts)}


def _counts(done: int, ready: int, started: int, processed: int, completed: int) -> dict[str, int]:
    names = ("ready", "started", "processed", "completed")
    return {name: done + more for name, more in zip(names, (ready, started, processed, completed), strict=True)}
