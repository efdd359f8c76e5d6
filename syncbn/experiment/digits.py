"""Images made from what scikit-learn carries: its digits, plain or laid over its two photos; made once and cached."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

Arrays = dict[str, NDArray[np.uint8]]

NUM_TRAIN_DIGITS = 1297  # digits [0:1297] train, [1297:1797] test
SIDE, DIGIT_SIDE = 28, 24
RECIPE = 1  # part of the cache's file name: raise it when the images change


def digits() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Load the 1797 digits as `(1797, 8, 8)`, 0 to 255, and their classes `(1797,)`."""
    bunch = load_digits()
    return (bunch.images * (255 / 16)).astype(np.uint8), bunch.target.astype(np.uint8)


def photos() -> tuple[list[Image.Image], list[Image.Image]]:
    """Load the two photos (CC BY 2.0, credits in scikit-learn's images/README.txt), cut at 60 % of the width.

    Returns:
        The left parts, for training, and the right parts, for testing.
    """
    whole = [Image.fromarray(array) for array in load_sample_images().images]
    cuts = [round(0.6 * image.width) for image in whole]
    left = [image.crop((0, 0, cut, image.height)) for image, cut in zip(whole, cuts, strict=True)]
    right = [image.crop((cut, 0, *image.size)) for image, cut in zip(whole, cuts, strict=True)]
    return left, right


def digits_on_photos(num_train: int = 14_000, num_val: int = 1_000, num_test: int = 1_500, seed: int = 0) -> Arrays:
    """Make images of `|photo crop - digit|`, the MNIST-M recipe (Ganin & Lempitsky 2015, section 4.1).

    Train and validation images are different draws from the digits [0:1297] and the left parts of the photos; test
    images come from the digits [1297:1797] and the right parts, which training never sees.

    Returns:
        `train_images`, `val_images`, `test_images`, each `(N, 28, 28, 3)`, and `..._labels`, each `(N,)`.
    """
    images, labels = digits()
    left, right = photos()
    train, test = slice(0, NUM_TRAIN_DIGITS), slice(NUM_TRAIN_DIGITS, None)
    arrays: Arrays = {}
    for index, (split, num, part, background) in enumerate(
        [("train", num_train, train, left), ("val", num_val, train, left), ("test", num_test, test, right)]
    ):
        rng = np.random.default_rng([seed, index])
        drawn = _draw(rng, num, images[part], labels[part], background)
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = drawn
    return arrays


def _draw(
    rng: np.random.Generator,
    num: int,
    images: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    background: list[Image.Image],
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Lay `num` random digits over random photo crops."""
    size = (DIGIT_SIDE, DIGIT_SIDE)
    large = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)) for image in images]
    picked = rng.integers(len(images), size=num)
    out = np.empty((num, SIDE, SIDE, 3), np.uint8)
    for i, digit in enumerate(picked):
        crop = _crop(rng, background[rng.integers(len(background))]).astype(np.int16)
        y, x = rng.integers(SIDE - DIGIT_SIDE + 1, size=2)  # the middle, give or take 2 pixels
        crop[y : y + DIGIT_SIDE, x : x + DIGIT_SIDE] -= large[digit][:, :, None]
        out[i] = np.abs(crop)
    return out, labels[picked]


def _crop(rng: np.random.Generator, photo: Image.Image) -> NDArray[np.uint8]:
    """Cut a random square of 1 to 3 times the final side, scaled to it; half of them are mirrored."""
    side = SIDE * rng.uniform(1, 3)
    x, y = rng.uniform(0, photo.width - side), rng.uniform(0, photo.height - side)
    box = (x, y, x + side, y + side)
    crop = np.asarray(photo.resize((SIDE, SIDE), Image.Resampling.BOX, box=box))
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def cached(path: Path, make: Callable[[], Arrays]) -> Arrays:
    """Read the arrays in `path`, or make and keep them; processes that start together make them once.

    The file appears whole or not at all, and a broken one is made anew. Where nothing can be written, the arrays are
    made each time.
    """
    path = path.expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            arrays = _read(path)
            if arrays is None:
                arrays = make()
                _write(path, arrays)
            return arrays
    except (OSError, NotImplementedError):  # read-only, full, or without locks
        return make()


def _read(path: Path) -> Arrays | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (FileNotFoundError, EOFError, ValueError, TypeError, zipfile.BadZipFile):
        return None


def _write(path: Path, arrays: Arrays) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        np.savez(file, allow_pickle=False, **arrays)
    os.replace(file.name, path)
