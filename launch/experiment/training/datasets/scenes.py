"""Scenes to segment: one to three of scikit-learn's digits on one of its photos, with the class of every pixel."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from experiment.training.datasets.digits import Arrays, Pair, crop_photo, make_splits, scale, split_digits

SIDE = 32
DIGIT_SIDES = range(14, 19)
NUM_CLASSES = 11  # background and ten digits
INK = 100  # more ink than this, of 255, makes a pixel the digit's
NUM_TRIES = 50
RECIPE = 1  # part of the cache's file name: raise it when the scenes change


def digit_scenes(num_train: int = 8_000, num_val: int = 300, num_test: int = 600, seed: int = 0) -> Arrays:
    """Make scenes of bright digits over a dimmed photo crop, `ink * colour + (1 - ink) * crop`.

    A pixel's class is 0 on the background and 1 to 10 under the ink of a digit 0 to 9; digits touch, but share no
    pixel. Splits as in `digits.split_digits` and `digits.make_splits`.

    Returns:
        `train_images`, `val_images`, `test_images`, each `(N, 32, 32, 3)`, and `..._labels`, each `(N, 32, 32)`.
    """
    return make_splits(_draw, split_digits(), (num_train, num_val, num_test), seed)


def _draw(
    rng: np.random.Generator,
    num: int,
    images: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    background: list[Image.Image],
) -> Pair:
    """Compose `num` scenes of up to 1, 2 or 3 random digits of random size and colour."""
    large = [scale(images, side) for side in DIGIT_SIDES]
    scenes = np.empty((num, SIDE, SIDE, 3), np.uint8)
    maps = np.zeros((num, SIDE, SIDE), np.uint8)
    for scene, classes in zip(scenes, maps, strict=True):
        crop = crop_photo(rng, background[rng.integers(len(background))], SIDE)
        pixels = crop * rng.uniform(0.2, 0.5)
        free = np.ones((SIDE, SIDE), bool)
        for _ in range(rng.integers(1, 4)):
            digit = rng.integers(len(images))
            ink = large[rng.integers(len(large))][digit]
            region = _find_region(rng, free, ink > INK)
            if region is None:
                continue
            alpha = ink[:, :, None] / 255
            pixels[region] += alpha * (rng.uniform(160, 255, size=3) - pixels[region])
            classes[region][ink > INK] = 1 + labels[digit]
            free[region][ink > INK] = False
        scene[...] = pixels.round()
    return scenes, maps


def _find_region(
    rng: np.random.Generator, free: NDArray[np.bool_], inked: NDArray[np.bool_]
) -> tuple[slice, slice] | None:
    """Find where a digit meets no other; a digit for which a few random places are taken is left out."""
    side = len(inked)
    for y, x in rng.integers(SIDE - side + 1, size=(NUM_TRIES, 2)):
        region = slice(y, y + side), slice(x, x + side)
        if free[region][inked].all():
            return region
    return None
