"""Test a trained model with each requested choice of BatchNorm statistics.

- rank0: the running statistics of rank 0, which DDP keeps and a checkpoint holds;
- averaged: the mean of all ranks' running statistics;
- precise: computed from training batches after training, `syncbn.update_bn_stats`;
- batch: those of each test batch, as large as in training (test images that do not fill the last one are left out).
"""

import math
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

import syncbn
from experiment.simulation.simulate import SimulatedBatchNorm
from experiment.training.data import ImageData
from experiment.training.task import Task
from syncbn.statistics.freeze import is_frozen
from syncbn.statistics.precise import BEFORE_WARMUP

MODES = ("rank0", "averaged", "precise", "batch")

Layers = dict[str, _BatchNorm]


def check_modes(modes: Sequence[str], data: ImageData | None = None) -> None:
    """Refuse modes that do not exist, none at all, and one that `data` has too few images for."""
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown or not modes:
        raise ValueError(f"expected evaluate to be a list of {', '.join(MODES)}, got {list(modes)}")
    if data is not None and "batch" in modes:
        plan, num_images = data.plan, min(len(data.eval_set), len(data.train_eval_indices))
        if num_images < plan.per_rank_batch_size * plan.world_size:
            raise ValueError(
                f"evaluate with statistics of the batch needs {plan.per_rank_batch_size} x {plan.world_size} images, "
                f"got {num_images}: leave 'batch' out of evaluate, or take more images"
            )


def evaluate(trainer: L.Trainer, task: Task, data: ImageData, modes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Test with each mode's statistics, on the images of `data.eval_split`; the model's own are as before afterwards.

    Returns:
        Per mode `test_error` and `train_error` (1 - score, in eval mode), `test_loss` and `train_loss` (nats per
        label), and `num_test` images; with `eval_split` val, `val_error` and so on. Without layers that have running
        statistics to choose, all modes are the same test.
    """
    [statistics] = [c for c in trainer.callbacks if isinstance(c, Statistics)]  # type: ignore[attr-defined]
    results: dict[str, dict[str, Any]] = {}
    for mode in modes:
        if results and not statistics.layers:
            results[mode] = results[modes[0]]
            continue
        statistics.mode, data.eval_in_training_batches = mode, mode == "batch" and bool(_layers(task))
        num_images = len(data.eval_set)
        if data.eval_in_training_batches:
            num_images -= num_images % (data.plan.per_rank_batch_size * data.plan.world_size)
        [metrics, train_metrics] = trainer.test(task, datamodule=data, weights_only=True, verbose=False)
        results[mode] = {
            f"{data.eval_split}_error": 1 - metrics[f"{data.eval_split}/{task.score}"],
            f"{data.eval_split}_loss": _finite(metrics[f"{data.eval_split}/loss"]),
            "train_error": 1 - train_metrics[f"train_eval/{task.score}"],
            "train_loss": _finite(train_metrics["train_eval/loss"]),
            f"num_{data.eval_split}": num_images,
        }
    data.eval_in_training_batches = False
    return results


class Statistics(L.Callback):
    """Give a test the statistics of `mode`, and the model its own back."""

    def __init__(self) -> None:
        self.mode = "rank0"
        self.layers: Layers = {}
        self.trained: dict[str, dict[str, Tensor]] = {}

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember this rank's statistics: Lightning copies rank 0's to all before a test."""
        self.trained = _buffers(_layers(pl_module))

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose, after Lightning has put the model into eval mode."""
        self.layers = _layers(pl_module)
        self.saved = _buffers(self.layers)
        if self.mode != "rank0":
            getattr(self, f"_{self.mode}")(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore."""
        _restore(self.layers, self.saved)

    def _averaged(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        _restore(self.layers, self.trained or self.saved)
        for layer in self.layers.values():
            if isinstance(layer, SimulatedBatchNorm):
                layer.running_mean.copy_(layer.split_running_mean.mean(0))  # type: ignore[union-attr]
                layer.running_var.copy_(layer.split_running_var.mean(0))  # type: ignore[union-attr]
        if self.layers:
            syncbn.average_bn_stats(task)

    def _precise(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        if self.layers:
            data: ImageData = trainer.datamodule  # type: ignore[attr-defined]
            syncbn.update_bn_stats(task, data.statistics_images())

    def _batch(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        for layer in self.layers.values():
            layer.train()
            if isinstance(layer, syncbn.BatchRenorm):
                layer.num_batches_tracked.fill_(BEFORE_WARMUP)


def _layers(model: torch.nn.Module) -> Layers:
    """Find the layers with running statistics that are not frozen."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None and not is_frozen(layer)
    }


def _buffers(layers: Layers) -> dict[str, dict[str, Tensor]]:
    return {name: {k: v.clone() for k, v in layer.named_buffers()} for name, layer in layers.items()}


def _restore(layers: Layers, saved: dict[str, dict[str, Tensor]]) -> None:
    for name, layer in layers.items():
        for key, buffer in layer.named_buffers():
            buffer.copy_(saved[name][key])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
