"""The images of the experiments, in three splits; those for testing are read only when they are asked for."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from experiment.training.datasets.sources import DigitsOnPhotos
from experiment.training.image_set import ImageSet

NUM_TRAIN, NUM_VALIDATE = 1000, 297  # of scikit-learn's 1797 digits; the other 500 test
NUM_FEW = 200  # training images where generalization is asked about
MEAN, STD = (0.39, 0.36, 0.35), (0.31, 0.25, 0.27)  # as conf/data/digits_on_photos.yaml


@dataclass(frozen=True)
class Split:
    """Hold normalized images `(N, ...)` and their classes `(N,)`."""

    images: Tensor
    labels: Tensor

    def first(self, num: int) -> "Split":
        """Take the first images."""
        return Split(self.images[:num], self.labels[:num])


@dataclass(frozen=True)
class Images:
    """Hold the splits of one source; rates are chosen on `validate`, and `test()` is for results alone."""

    train: Split
    validate: Split
    test: Callable[[], Split]


@cache
def digits() -> Images:
    """Load scikit-learn's digits, `(N, 64)`: setting S."""
    bunch = load_digits()
    images = torch.tensor(bunch.data / 16, dtype=torch.float32)
    images = (images - images[:NUM_TRAIN].mean()) / images[:NUM_TRAIN].std()
    labels = torch.tensor(bunch.target)
    end = NUM_TRAIN + NUM_VALIDATE
    cuts = (slice(NUM_TRAIN), slice(NUM_TRAIN, end), slice(end, None))
    train, validate, test = (Split(images[cut], labels[cut]) for cut in cuts)
    return Images(train, validate, lambda: test)


def few_digits() -> Images:
    """Load the digits with only 200 of them to train with."""
    images = digits()
    return replace(images, train=images.train.first(NUM_FEW))


@cache
def digits_on_photos() -> Images:
    """Load, or make once, digits laid over photos, `(N, 3, 28, 28)`: setting R."""
    sizes = {"num_train": 14_000, "num_val": 1_000, "num_test": 1_500}
    source = DigitsOnPhotos(os.environ.get("SYNCBN_CACHE", "~/.cache/syncbn"), **sizes, mean=MEAN, std=STD)
    splits = source.make_splits()

    def read(images: ImageSet) -> Split:
        assert isinstance(images.images, Tensor)
        return Split(source.normalize(images.images), images.labels.long())

    assert splits.val is not None
    return Images(read(splits.train), read(splits.val), cache(lambda: read(splits.test)))
