"""The base class of the tasks, with learning rate schedule and metrics over all ranks, and image classification."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, cast

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from experiment.training.schedule import scale_lr, warmup_cosine
from syncbn.compat import copy_buffers_once
from syncbn.nn import fixup


class Task(L.LightningModule, ABC):
    """Train a model by cross entropy and measure it; a subclass says by which score, and with which optimizer.

    Score and loss are sums over labels, joined over the ranks at the end of an epoch by torchmetrics (one exchange
    per state of a metric), so uneven and empty last batches count as they should.

    Args:
        net: Images `(N, C, H, W)` to logits `(N, num_classes)`; per pixel, `(N, num_classes, H, W)`.
        num_classes: Classes of the data.
        global_batch_size: Images of one optimizer step, for the learning-rate rule.
        lr: At `reference_batch_size`.
        lr_rule: constant, sqrt or linear.
        reference_batch_size: The batch `lr` was chosen for.
        weight_decay: On parameters with more than one dimension: no norm layer, bias or scale of a weight.
        warmup: Fraction of all steps.
        scalar_lr: Factor of the learning rate for the scalars of FixUp, whose weights decay like those of layers.
        seed: Of augmentation and dropout; every epoch and rank has its own stream.
    """

    score: ClassVar[str]  # in the names of metrics: val/<score>, test/<score>, train_eval/<score>
    score_name: ClassVar[str]  # in reports; a fraction, and 1 - score is the error
    per_pixel: ClassVar[bool] = False  # whether every pixel has a label, or every image

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        global_batch_size: int = 32,
        *,
        lr: float,
        lr_rule: str = "linear",
        reference_batch_size: int = 32,
        weight_decay: float = 1e-4,
        warmup: float = 0.1,
        scalar_lr: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.net, self.seed, self.warmup = net, seed, warmup
        self.lr = scale_lr(lr, lr_rule, global_batch_size, reference_batch_size)
        self.weight_decay, self.scalar_lr = weight_decay, scalar_lr
        self.num_steps = 0
        self.first_step: int | None = None
        self.train_loss = MeanMetric()
        names = ("val", "test", "train_eval")
        self.losses = nn.ModuleDict({name: MeanMetric() for name in names})
        self.scores = nn.ModuleDict({name: self.make_score(num_classes) for name in names})

    @abstractmethod
    def make_score(self, num_classes: int) -> Metric:
        """Make a metric of logits and labels, higher is better."""

    @abstractmethod
    def make_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """Make the optimizer of these parameter groups, which say their weight decay."""

    def check_labels(self, labels: Tensor) -> None:
        """Refuse the labels of another kind of task, before training.

        Raises:
            ValueError: one label per image where every pixel needs one, or the other way round.
        """
        if labels.ndim != (3 if self.per_pixel else 1):
            wanted = "one label per pixel, (N, H, W)" if self.per_pixel else "one label per image, (N,)"
            shape = tuple(labels.shape)
            raise ValueError(f"{type(self).__name__} needs {wanted}, got {shape}: choose data and task that fit")

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(N, C, H, W)` to logits."""
        logits: Tensor = self.net(images)
        return logits

    def on_train_start(self) -> None:
        """Remember the step this run starts from: not 0 if it starts from a checkpoint of another run."""
        if isinstance(self.trainer.strategy.model, DistributedDataParallel):
            copy_buffers_once(self.trainer.strategy.model)
        if self.first_step is None:
            self.first_step = self.trainer.global_step

    def on_fit_end(self) -> None:
        """Count the optimizer steps of this run, also if none was left to train."""
        self.num_steps = 0 if self.first_step is None else self.trainer.global_step - self.first_step

    def on_train_epoch_start(self) -> None:
        """Give this epoch and rank their own random stream, the same after a resume."""
        torch.manual_seed((self.seed * 10_007 + self.current_epoch) * 100_003 + self.global_rank)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Compute the mean cross entropy over the labels of a batch."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of this rank's batch; DDP averages the gradients over equal batches."""
        loss, num_images = self.loss(batch), len(batch[1])
        self.train_loss.update(loss.detach().float())  # what it casts to itself depends on when the run started
        self.log("loss", loss, prog_bar=True, batch_size=num_images)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, batch_size=num_images)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count one batch of validation images."""
        self._measure("val", batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count one batch of the images of `eval_split`, or of training images seen in eval mode."""
        split = getattr(getattr(self.trainer, "datamodule", None), "eval_split", "test")
        self._measure(("test", "train_eval")[dataloader_idx], batch, (split, "train_eval")[dataloader_idx])

    def _measure(self, metric: str, batch: tuple[Tensor, Tensor], name: str) -> None:
        images, labels = batch
        loss, score = cast(Metric, self.losses[metric]), cast(Metric, self.scores[metric])
        if len(labels):  # a rank without any image only takes part in the exchange
            logits = self(images)
            loss.update(F.cross_entropy(logits, labels, reduction="none"))
            score.update(logits, labels)
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "add_dataloader_idx": False}
        self.log(f"{name}/loss", loss, batch_size=len(labels), **options)
        self.log(f"{name}/{self.score}", score, batch_size=len(labels), prog_bar=True, **options)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Optimize the parameters as they are after conversion, with a rate that changes every step."""
        scalars = fixup.scalars(self)
        ids = {id(scalar) for scalar in scalars}
        named = [(name, p) for name, p in self.named_parameters() if id(p) not in ids]
        groups: list[dict[str, Any]] = [
            {"params": [p for name, p in named if _decays(name, p)], "weight_decay": self.weight_decay},
            {"params": [p for name, p in named if not _decays(name, p)], "weight_decay": 0.0},
        ]
        if scalars:
            groups.append({"params": scalars, "weight_decay": self.weight_decay, "lr": self.lr * self.scalar_lr})
        optimizer = self.make_optimizer(groups)
        num_steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_cosine(step, num_steps, self.warmup)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: not to the scale of torch's weight_norm, which has its weight's dimensions."""
    return parameter.ndim > 1 and not name.endswith(".parametrizations.weight.original0")


class Classifier(Task):
    """Classify images, by SGD with momentum; the score is the accuracy.

    Args:
        net: Images `(N, C, H, W)` to logits `(N, num_classes)`.
        num_classes: Classes of the data.
        global_batch_size: Images of one optimizer step, for the learning-rate rule.
        lr: At `reference_batch_size`.
        momentum: Of SGD.
        **kwargs: As `Task`.
    """

    score, score_name = "acc", "accuracy"

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        global_batch_size: int = 32,
        *,
        lr: float = 0.1,
        momentum: float = 0.9,
        **kwargs: Any,
    ) -> None:
        super().__init__(net, num_classes, global_batch_size, lr=lr, **kwargs)
        self.momentum = momentum

    def make_score(self, num_classes: int) -> Metric:
        """Count the images whose largest logit is that of their label."""
        return MulticlassAccuracy(num_classes, average="micro", validate_args=False)

    def make_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """Make SGD with momentum."""
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)
