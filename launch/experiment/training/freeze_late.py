"""Train with BatchNorm, and for the last part of training normalize with precise statistics that no longer move."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

import syncbn
from experiment.training.data import ImageData
from syncbn.lightning import NormConverter


class FreezeLate(NormConverter):
    """Convert as `NormConverter`; before optimizer step `freeze_at * steps`, compute precise statistics and freeze.

    Source: Wu & Johnson 2021, sections 3 and 4. Collectives: those of `syncbn.update_bn_stats`, once. Simulated ranks
    are converted before the fit; then this only freezes.

    Args:
        norm: Of the training before, `bn` or another with running statistics.
        freeze_at: Part of the run's optimizer steps that are trained before; at least 0, below 1.
        **options: As `NormConverter`.

    Raises:
        ValueError: `freeze_at` out of its range; before the first step, layers without running statistics.
    """

    def __init__(self, norm: str = "bn", *, freeze_at: float = 0.75, **options: Any) -> None:
        if isinstance(freeze_at, bool) or not isinstance(freeze_at, int | float) or not 0 <= freeze_at < 1:
            raise ValueError(
                f"expected norm.freeze_at to be a part of the training, at least 0, below 1, got {freeze_at!r}"
            )
        super().__init__(norm, **options)
        self.freeze_at, self.is_frozen = freeze_at, False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Convert, except layers that simulate ranks: they are converted."""
        data: ImageData = trainer.datamodule  # type: ignore[attr-defined]
        if data.world.simulate is None:
            super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Freeze again after a resume; else find the step, and find out now whether every layer can be frozen."""
        num_steps = trainer.estimated_stepping_batches  # of the whole run, also after a resume
        if not 1 <= num_steps < math.inf:
            raise ValueError(f"norm.freeze_at is a part of the run's steps, of which there are {num_steps}: limit it")
        self.step = min(round(self.freeze_at * num_steps), int(num_steps) - 1)
        syncbn.freeze(pl_module)
        if not self.is_frozen:
            syncbn.unfreeze(pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Freeze before the first batch of the step; a checkpoint made between these two steps is made after it."""
        if self.is_frozen or trainer.global_step < self.step:
            return
        data: ImageData = trainer.datamodule  # type: ignore[attr-defined]

        def forward(module: nn.Module, images: Tensor) -> None:
            with trainer.precision_plugin.train_step_context():
                module(images)

        with isolate_rng():  # dropout and augmentation go on as in a run that does not freeze
            freeze_precisely(pl_module, data.statistics_images(), forward)
        self.is_frozen = True

    def state_dict(self) -> dict[str, Any]:
        """Give what a checkpoint keeps."""
        return {"is_frozen": self.is_frozen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what a checkpoint kept."""
        self.is_frozen = state_dict["is_frozen"]


def freeze_precisely(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None
) -> None:
    """Compute the statistics of `batches` over all ranks, real or simulated, and freeze every layer with them.

    Args:
        model: The same model on every rank, or one that simulates all of them.
        batches: This rank's, or those of all ranks joined; see `syncbn.update_bn_stats`.
        forward: As there.
    """
    syncbn.update_bn_stats(model, batches, forward=forward)
    for layer in model.modules():
        if isinstance(layer, syncbn.GhostBatchNorm) and layer.track_per_split:  # what each simulated rank holds
            layer.split_running_mean.copy_(layer.running_mean)  # type: ignore[arg-type]
            layer.split_running_var.copy_(layer.running_var)  # type: ignore[arg-type]
    syncbn.freeze(model)
