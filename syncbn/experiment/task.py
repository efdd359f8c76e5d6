"""The task: classify images, with SGD, warm-up and cosine, and metrics that are exact over all ranks."""

from __future__ import annotations

import math
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

LR_RULES = {"constant": 0.0, "sqrt": 0.5, "linear": 1.0}  # the power of global_batch_size / reference


def scale_lr(lr: float, rule: str, global_batch_size: int, reference_batch_size: int) -> float:
    """Scale the learning rate: `lr * (global_batch_size / reference_batch_size) ** power`.

    The power is 0 (constant), 1/2 (sqrt) or 1 (linear; Goyal et al. 2017, section 2.1).

    Raises:
        ValueError: an unknown rule.

    >>> scale_lr(0.1, "linear", 8, 32)
    0.025
    """
    if rule not in LR_RULES:
        raise ValueError(f"expected task.lr_rule to be one of {', '.join(LR_RULES)}, got {rule!r}")
    return float(lr * (global_batch_size / reference_batch_size) ** LR_RULES[rule])


def warmup_cosine(step: int, num_steps: int, warmup: float) -> float:
    """Give the factor of the learning rate: a line up to 1 for `warmup * num_steps` steps, then half a cosine to 0."""
    num_warmup = round(warmup * num_steps)
    if step < num_warmup:
        return (step + 1) / num_warmup
    return 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / max(1, num_steps - num_warmup)))


class Classifier(L.LightningModule):
    """Train a classifier by cross entropy and measure it.

    Accuracy and loss are sums over images, joined over the ranks at the end of an epoch by torchmetrics (one exchange
    per metric), so uneven and empty last batches count as they should.

    Args:
        net: Images `(N, C, H, W)` to logits `(N, num_classes)`.
        num_classes: Classes of the data.
        global_batch_size: Images of one optimizer step, for the learning-rate rule.
        lr: At `reference_batch_size`.
        lr_rule: constant, sqrt or linear.
        reference_batch_size: The batch `lr` was chosen for.
        momentum: Of SGD.
        weight_decay: On parameters with more than one dimension: no norm layer, no bias.
        warmup: Fraction of all steps.
        seed: Of augmentation and dropout; every epoch and rank has its own stream.
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        global_batch_size: int = 32,
        *,
        lr: float = 0.1,
        lr_rule: str = "linear",
        reference_batch_size: int = 32,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        warmup: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.net, self.seed, self.warmup = net, seed, warmup
        self.lr = scale_lr(lr, lr_rule, global_batch_size, reference_batch_size)
        self.momentum, self.weight_decay = momentum, weight_decay
        self.num_steps = 0
        self.train_loss = MeanMetric()
        names = ("val", "test", "train_eval")
        self.losses = nn.ModuleDict({name: MeanMetric() for name in names})
        self.accuracies = nn.ModuleDict(
            {name: MulticlassAccuracy(num_classes, average="micro", validate_args=False) for name in names}
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(N, C, H, W)` to logits `(N, num_classes)`."""
        logits: Tensor = self.net(images)
        return logits

    def on_train_start(self) -> None:
        """Remember the step this run starts from: not 0 after a resume."""
        self.first_step = self.trainer.global_step

    def on_train_end(self) -> None:
        """Count the optimizer steps of this run."""
        self.num_steps = self.trainer.global_step - self.first_step

    def on_train_epoch_start(self) -> None:
        """Give this epoch and rank their own random stream, the same after a resume."""
        torch.manual_seed((self.seed * 10_007 + self.current_epoch) * 100_003 + self.global_rank)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross entropy of this rank's batch; DDP averages the gradients over equal batches."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.train_loss.update(loss.detach())
        self.log("loss", loss, prog_bar=True, batch_size=len(labels))
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count one batch of validation images."""
        self._measure("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count one batch of test images, or of training images seen in eval mode."""
        self._measure(("test", "train_eval")[dataloader_idx], batch)

    def _measure(self, name: str, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        loss, accuracy = cast(Metric, self.losses[name]), cast(Metric, self.accuracies[name])
        if len(labels):  # a rank without any image only takes part in the exchange
            logits = self(images)
            loss.update(F.cross_entropy(logits, labels, reduction="none"))
            accuracy.update(logits, labels)
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "add_dataloader_idx": False}
        self.log(f"{name}/loss", loss, batch_size=len(labels), **options)
        self.log(f"{name}/acc", accuracy, batch_size=len(labels), prog_bar=True, **options)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Make SGD over the parameters as they are after conversion, with a rate that changes every step."""
        groups = [
            {"params": [p for p in self.parameters() if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in self.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)
        num_steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_cosine(step, num_steps, self.warmup)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
