"""Sets of images that are read batch by batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from experiment.training.sharding import Draw

Batch = tuple[Tensor, Tensor]  # images (N, C, H, W) and labels (N,), or (N, H, W) per pixel


class ImageSet(Dataset[Batch]):
    """Serve batches: `dataset[Draw([3, 1], seed=0)]` gives images `(2, C, H, W)` uint8 and labels `(2, ...)`.

    Args:
        images: `(N, C, H, W)` uint8, or a sequence that gives image `(C, H, W)` i.
        labels: `(N,)`, or `(N, H, W)` per pixel.
        transform: Applied to each image, for augmentation. It draws from a random stream of the image and the
            batch's seed, so an image looks the same on every rank and in every process.
    """

    def __init__(
        self,
        images: Tensor | Sequence[Tensor],
        labels: Tensor,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        """Count the images."""
        return len(self.labels)

    def __getitem__(self, draw: Draw) -> Batch:
        """Read one batch; one without any index is empty."""
        indices = draw.indices
        if isinstance(self.images, Tensor) and self.transform is None:
            return self.images[indices], self.labels[indices].long()
        with torch.random.fork_rng(devices=[]):
            images = [self._read(i, draw.seed) for i in indices or [0]]
        return torch.stack(images)[: len(indices)], self.labels[indices].long()

    def _read(self, index: int, seed: int) -> Tensor:
        image = self.images[index]
        if self.transform is None:
            return image
        torch.manual_seed(hash((seed, index)))  # of numbers: the same in every process
        return self.transform(image)


class Part(ImageSet):
    """Serve some images of a set, by their indices there."""

    def __init__(self, whole: ImageSet, indices: Tensor) -> None:
        super().__init__(whole.images, whole.labels[indices], whole.transform)
        self.whole, self.indices = whole, indices

    def __getitem__(self, draw: Draw) -> Batch:
        """Read one batch; one without any index is empty."""
        return self.whole[Draw(self.indices[draw.indices].tolist(), draw.seed)]


@dataclass
class Splits:
    """Hold the sets of one source; `train_plain` is `train` without augmentation."""

    train: ImageSet
    train_plain: ImageSet
    val: ImageSet | None
    test: ImageSet
    num_classes: int

    def hold_out(self) -> "Splits":
        """Let every tenth training image validate, and no longer train."""
        index = torch.arange(len(self.train))
        rest, val = index[index % 10 != 0], index[index % 10 == 0]
        parts = Part(self.train, rest), Part(self.train_plain, rest), Part(self.train_plain, val)
        return Splits(*parts, self.test, self.num_classes)
