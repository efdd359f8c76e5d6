"""The task of semantic segmentation: predict the class of every pixel."""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torchmetrics import Metric
from torchmetrics.classification import MulticlassJaccardIndex

from experiment.training.task import Task


class Segmenter(Task):
    """Segment images, by AdamW; the score is the mean intersection over union (mIoU).

    Of one confusion matrix over all pixels of the set, summed over the ranks: per class
    `IoU = hits / (labels + predictions - hits)`, then the mean over the classes, the background among them. A class
    that is neither a label nor a prediction anywhere in the set has no IoU and is left out of the mean.

    Args:
        net: Images `(N, C, H, W)` to logits `(N, num_classes, H, W)`.
        num_classes: Classes of the data.
        global_batch_size: Images of one optimizer step, for the learning-rate rule.
        lr: At `reference_batch_size`.
        **kwargs: As `Task`.
    """

    score, score_name, per_pixel = "miou", "mIoU", True

    def __init__(
        self, net: nn.Module, num_classes: int, global_batch_size: int = 32, *, lr: float = 5e-3, **kwargs: Any
    ) -> None:
        super().__init__(net, num_classes, global_batch_size, lr=lr, **kwargs)

    def make_score(self, num_classes: int) -> Metric:
        """Count pairs of label and prediction, `(num_classes, num_classes)`."""
        return MulticlassJaccardIndex(num_classes, average="macro", validate_args=False)

    def make_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """Make AdamW (Loshchilov & Hutter 2019)."""
        return torch.optim.AdamW(groups, lr=self.lr)
