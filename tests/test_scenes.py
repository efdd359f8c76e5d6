"""The scenes: a pixel has a digit's class exactly where its ink is."""

import numpy as np
import pytest
from PIL import Image

from experiment.training.datasets import digits, scenes

BLACK = [Image.new("RGB", (100, 100), 0)]


def draw(ink, label=3, num=20):
    """Draw scenes on black of a digit that is a full square of this ink."""
    full = np.full((1, 8, 8), ink, np.uint8)
    return scenes._draw(np.random.default_rng(0), num, full, np.full(1, label, np.uint8), BLACK)


def test_labels_are_where_the_ink_is():
    images, labels = draw(ink=255)
    assert set(np.unique(labels)) == {0, 4}
    assert ((images > 0).any(3) == (labels == 4)).all()
    assert images[labels == 4].min() >= 160
    areas = (labels == 4).sum((1, 2))
    assert areas.max() <= 3 * 18**2
    assert areas.min() >= 14**2


@pytest.mark.parametrize(("ink", "classes"), [(90, {0}), (110, {0, 4})])
def test_faint_ink_is_background(ink, classes):
    images, labels = draw(ink)
    assert images.any((1, 2, 3)).all()
    assert set(np.unique(labels)) == classes


def test_the_photo_is_dimmed_where_no_digit_is():
    white = [Image.new("RGB", (100, 100), (255, 255, 255))]
    images, labels = digits.digits()
    drawn, maps = scenes._draw(np.random.default_rng(0), 50, images, labels, white)
    corners = drawn[:, [0, 0, -1, -1], [0, -1, 0, -1]].min((1, 2))
    assert corners.min() >= 0.2 * 255 - 1
    assert corners.max() <= 0.5 * 255 + 1
    assert drawn[maps > 0].mean() > 1.5 * drawn[maps == 0].mean()


def test_all_classes_are_in_every_split_and_a_digit_in_every_scene():
    arrays = scenes.digit_scenes(150, 100, 100)
    for split in ("train", "val", "test"):
        labels = arrays[f"{split}_labels"]
        assert set(np.unique(labels)) == set(range(scenes.NUM_CLASSES))
        assert (labels > 0).any((1, 2)).all()
