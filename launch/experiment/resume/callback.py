"""Save checkpoints between two optimizer steps, and restore a trainer to exactly that state.

Lightning's checkpoint holds the state of rank 0. The state that every rank has of its own (running statistics, random
states, the metrics of an unfinished epoch) is added to it. Lightning's own callback saves before the metrics of a
step are written; these checkpoints are made after them, so that no row is lost or written twice.
"""

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch.optim import Optimizer

from experiment.resume import lightning_loops, rank_state
from experiment.resume.checkpoint_files import LAST, PART
from experiment.resume.csv_logger import ResumableCSVLogger
from experiment.resume.progress import Progress, Start, rescale
from experiment.resume.signals import Signals
from experiment.training.report import Clock


class Checkpoints(Checkpoint):
    """Save every so many steps, at the end of each epoch and of training, and when a signal asks to stop.

    Collectives: one all-reduce of one number per step (shall all stop?); with a checkpoint, two gathers to rank 0.

    Args:
        folder: For the checkpoints; used on rank 0 alone.
        start: Where the run starts.
        every: Number of optimizer steps between checkpoints; None for the ends of epochs alone.
    """

    def __init__(self, folder: Path, start: Start, every: int | None) -> None:
        self.folder, self.every = folder, every
        self._start_from(start)
        self.signals = Signals()
        self.own: dict[str, Any] | None = None
        self.optimizer_states: list[dict[str, Any]] = []

    def _start_from(self, start: Start) -> None:
        self.start, self.progress, self.saved_step = start, start.progress, start.progress.step

    def agree(self, trainer: L.Trainer, find: Callable[[], Start]) -> None:
        """Make sure, before the fit, that all ranks start from the same step; `find` looks for it once more.

        Rank 0 looks after it has locked the run directory; other ranks may look before that, while the ranks of a
        killed run still write their last checkpoint. Collectives: the process group is initialized here, followed by
        all-reduces of one number.

        Raises:
            RuntimeError: on all ranks: they find different checkpoints now, too.
        """
        if trainer.world_size == 1:
            return
        trainer.strategy.setup_environment()
        try:
            rank_state.check_equal(trainer, self.start.progress.step)
        except RuntimeError:
            self._start_from(find())
        else:
            return
        try:
            rank_state.check_equal(trainer, self.start.progress.step)
        except RuntimeError as error:
            raise RuntimeError(f"{error}, and in which no earlier run still writes") from None

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Turn the saved progress into that of this run, before Lightning restores from it."""
        part, progress = checkpoint[PART], self.start.progress
        lightning_loops.write_progress(checkpoint["loops"]["fit_loop"], progress, trainer)
        if progress != (saved := Progress.from_dict(part["place"])):
            rescale(checkpoint, progress.lr / saved.lr, progress.step)
        trainer.datamodule.train_batches.resume(progress.epoch, progress.batch_of_epoch)  # type: ignore[attr-defined]
        if self.start.same_run:
            pl_module.first_step = part["first_step"]
            _clock(trainer).seconds = part["seconds"]
            for logger in trainer.loggers:
                if isinstance(logger, ResumableCSVLogger):
                    logger.resume(part["num_rows"])
        else:
            self.optimizer_states = checkpoint["optimizer_states"]
        if self.start.same_ranks:
            self.own = part["ranks"][trainer.global_rank]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the statistics of each rank, which DDP made equal, and apply the optimizer settings of a new run."""
        if self.own is not None:
            rank_state.restore(pl_module, self.own)
        notes = _keep_settings(self.optimizer_states, trainer.optimizers)
        self.optimizer_states = []
        if trainer.is_global_zero:
            for note in notes:
                print(note)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the random states, last of all, and handle signals instead of Lightning."""
        if self.start.path is not None and not self.progress.step_of_epoch:
            lightning_loops.begin_epoch(trainer)
        if self.own is not None:
            if trainer.world_size > 2:
                rank_state.settle_buckets(trainer, pl_module)
            rank_state.restore_random(self.own)
        elif self.progress.step_of_epoch:
            pl_module.on_train_epoch_start()  # which Lightning leaves out within an epoch
        self.own = None
        self.signals.catch(alone=trainer.world_size == 1)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after the epoch before."""
        self._between(trainer, trainer.current_epoch, 0)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save after the step before if it is due, and stop if a signal asked for it."""
        step_of_epoch, rest = divmod(batch_idx, trainer.accumulate_grad_batches)
        if step_of_epoch and not rest:
            self._between(trainer, trainer.current_epoch, step_of_epoch)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after the last step, which `max_steps` may have set within an epoch."""
        num_batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if num_batches == trainer.num_training_batches:
            self._save(trainer, trainer.current_epoch, 0)
        else:
            self._save(trainer, trainer.current_epoch - 1, num_batches // trainer.accumulate_grad_batches)
        self._stop_if_asked(trainer, rank_state.largest(trainer, self.signals.wanted()))
        self.signals.release()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let SIGTERM end a test at once: it can be repeated."""
        self.signals.release()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the progress, and the state of each rank."""
        lightning_loops.write_progress(checkpoint["loops"]["fit_loop"], self.progress, trainer)
        checkpoint[PART] = {
            "place": self.progress.as_dict(),  # named so in checkpoints since version 0.1
            "norm": self.start.norm,
            "first_step": pl_module.first_step,
            "seconds": _clock(trainer).elapsed(),
            "num_threads": torch.get_num_threads(),
            "num_rows": sum(logger.num_rows for logger in trainer.loggers if isinstance(logger, ResumableCSVLogger)),
            "ranks": rank_state.gather(trainer, rank_state.collect(pl_module)),
        }

    def _between(self, trainer: L.Trainer, epoch: int, step_of_epoch: int) -> None:
        """Save if it is due or a signal asks to stop; then stop in that case."""
        asked = rank_state.largest(trainer, self.signals.wanted())
        is_due = step_of_epoch == 0 or (self.every is not None and trainer.global_step % self.every == 0)
        if is_due or asked:
            self._save(trainer, epoch, step_of_epoch)
        self._stop_if_asked(trainer, asked)

    def _stop_if_asked(self, trainer: L.Trainer, asked: int) -> None:
        """End this process, on all ranks after the same step, with the exit code of the signal."""
        if asked:
            if trainer.is_global_zero:
                name, step = signal.Signals(asked).name, trainer.global_step
                print(f"{name}: stopped with a checkpoint of step {step}; run_dir={self.folder.parent} goes on")
            raise SystemExit(128 + asked)

    def _save(self, trainer: L.Trainer, epoch: int, step_of_epoch: int) -> None:
        """Save unless this step is saved; the metrics that it counts reach the disk before it does."""
        if trainer.global_step != self.saved_step:
            for logger in trainer.loggers:
                if isinstance(logger, ResumableCSVLogger):
                    logger.sync()
            self.progress = replace(self.progress, epoch=epoch, step_of_epoch=step_of_epoch, step=trainer.global_step)
            trainer.save_checkpoint(self.folder / LAST)
            self.saved_step = trainer.global_step


def _clock(trainer: L.Trainer) -> Clock:
    [clock] = [callback for callback in trainer.callbacks if isinstance(callback, Clock)]  # type: ignore[attr-defined]
    return clock


def _keep_settings(states: list[dict[str, Any]], optimizers: list[Optimizer]) -> list[str]:
    """Put the settings of the optimizers into the states they will load, except for the learning rates.

    Returns:
        A description of each change.
    """
    notes: list[str] = []
    for state, optimizer in zip(states, optimizers, strict=False):  # what does not fit is for torch to refuse
        for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=False):
            settings = {key: value for key, value in group.items() if key not in ("params", "lr", "initial_lr")}
            notes += [f"{k} {saved[k]} -> {v}" for k, v in settings.items() if k in saved and saved[k] != v]
            saved.update(settings)
    return list(dict.fromkeys(notes))
