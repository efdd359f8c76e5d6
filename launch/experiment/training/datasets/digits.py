"""Images made from what scikit-learn carries: its digits, plain or laid over its two photos; made once and cached.

Other digits, and other ways to lay them over the photos, go through the same `make_splits`.
"""

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from experiment.training.atomic_files import write_atomically

Arrays = dict[str, NDArray[np.uint8]]
Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]  # images and their labels
Draw = Callable[[np.random.Generator, int, NDArray[np.uint8], NDArray[np.uint8], list[Image.Image]], Pair]

NUM_TRAIN_DIGITS = 1297  # digits [0:1297] train, [1297:1797] test
SIDE, DIGIT_SIDE = 28, 24
RECIPE = 1  # part of the cache's file name: raise it when the images change


def digits() -> Pair:
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
    return make_splits(lay_over_photos, split_digits(), (num_train, num_val, num_test), seed)


def split_digits() -> list[Pair]:
    """Give the digits for training, validation and testing: [0:1297] for the first two, the others for the third."""
    images, labels = digits()
    train = images[:NUM_TRAIN_DIGITS], labels[:NUM_TRAIN_DIGITS]
    return [train, train, (images[NUM_TRAIN_DIGITS:], labels[NUM_TRAIN_DIGITS:])]


def make_splits(draw: Draw, parts: Sequence[Pair], nums: Sequence[int], seed: int) -> Arrays:
    """Draw `nums` training, validation and test images, each split with a random stream of its own.

    `draw(rng, num, images, labels, photos)` makes `num` images and their labels. It gets the digits of the split, of
    `parts`, and the left parts of the photos for training and validation, the right ones for testing.
    """
    left, right = photos()
    splits = zip(("train", "val", "test"), parts, (left, left, right), nums, strict=True)
    arrays: Arrays = {}
    for index, (split, (images, labels), background, num) in enumerate(splits):
        drawn = draw(np.random.default_rng([seed, index]), num, images, labels, background)
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = drawn
    return arrays


def lay_over_photos(
    rng: np.random.Generator,
    num: int,
    images: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    background: list[Image.Image],
) -> Pair:
    """Lay `num` random digits over random photo crops: the absolute difference."""
    scaled = scale(images, DIGIT_SIDE)
    picked = rng.integers(len(images), size=num)
    out = np.empty((num, SIDE, SIDE, 3), np.uint8)
    for i, digit in enumerate(picked):
        crop = crop_photo(rng, background[rng.integers(len(background))], SIDE).astype(np.int16)
        y, x = rng.integers(SIDE - DIGIT_SIDE + 1, size=2)  # the middle, give or take 2 pixels
        crop[y : y + DIGIT_SIDE, x : x + DIGIT_SIDE] -= scaled[digit][:, :, None]
        out[i] = np.abs(crop)
    return out, labels[picked]


def scale(images: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Scale gray images `(N, H, W)` to `(N, side, side)`."""
    scaled = [Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR) for image in images]
    return np.stack([np.asarray(image) for image in scaled])


def crop_photo(rng: np.random.Generator, photo: Image.Image, side: int) -> NDArray[np.uint8]:
    """Cut a random square of 1 to 3 times `side`, scaled to it, `(side, side, 3)`; half of them are mirrored."""
    cut = side * rng.uniform(1, 3)
    x, y = rng.uniform(0, photo.width - cut), rng.uniform(0, photo.height - cut)
    box = (x, y, x + cut, y + cut)
    crop = np.asarray(photo.resize((side, side), Image.Resampling.BOX, box=box))
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def cached(path: Path, make: Callable[[], Arrays]) -> Arrays:
    """Read the arrays in `path`, or make and keep them; processes that start together make them once.

    The file is written atomically, and a damaged one is replaced. Where nothing can be written, the arrays are made
    each time.
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
    write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **arrays))
