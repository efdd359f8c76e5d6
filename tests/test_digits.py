"""The images made here: splits share nothing, the same every time, made once and cached."""

import os

import numpy as np
import pytest
from PIL import Image

from experiment.training.datasets import digits, scenes

SMALL = {"num_train": 70, "num_val": 20, "num_test": 30}


@pytest.mark.parametrize(("module", "make"), [(digits, "digits_on_photos"), (scenes, "digit_scenes")])
def test_splits_share_no_digit_and_no_photo(monkeypatch, module, make):
    drawn = []
    monkeypatch.setattr(module, "_draw", lambda *args: drawn.append(args) or args[2:4])
    getattr(module, make)(**SMALL)
    images, labels = digits.digits()
    left, right = digits.photos()
    for (_, num, some, classes, photos), expected in zip(drawn, SMALL.values(), strict=True):
        assert num == expected
        test = num == SMALL["num_test"]
        assert np.array_equal(some, images[1297:] if test else images[:1297])
        assert np.array_equal(classes, labels[1297:] if test else labels[:1297])
        assert [p.tobytes() for p in photos] == [p.tobytes() for p in (right if test else left)]
    for a, b in zip(left, right, strict=True):
        assert (a.width, b.width, a.height) == (384, 256, 427)  # 60 and 40 % of 640 columns


@pytest.mark.parametrize(("make", "side"), [(digits.digits_on_photos, 28), (scenes.digit_scenes, 32)])
def test_images_are_the_same_every_time(make, side):
    first, again, other = (make(**SMALL, seed=seed) for seed in (0, 0, 1))
    assert first["train_images"].shape == (70, side, side, 3)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["train_images"], other["train_images"])
    assert not np.array_equal(first["train_images"][:20], first["val_images"])


def test_a_digit_is_the_difference_from_its_photo():
    black = Image.new("RGB", (100, 100), 0)
    rng = np.random.default_rng(0)
    images, _ = digits._draw(rng, 4, np.full((1, 8, 8), 200, np.uint8), np.zeros(1, np.uint8), [black])
    for image in images:
        assert (image == 200).sum() == 24 * 24 * 3
        assert (image == 0).sum() == (28 * 28 - 24 * 24) * 3


def make_counted(path):
    """Leave a trace of every making."""
    with (path.parent / "made").open("a") as file:
        file.write(f"{os.getpid()}\n")
    return {"images": np.arange(100_000, dtype=np.uint8)}


def read_cached(path):
    return digits.cached(path, lambda: make_counted(path))["images"].sum()


def read_cached_on_rank(rank, world_size, path):
    return read_cached(path)


def test_processes_that_start_together_make_the_cache_once(run, tmp_path):
    path = tmp_path / "a.npz"
    sums = run(read_cached_on_rank, 3, path, initialize=False)
    assert len(set(sums)) == 1
    assert len((tmp_path / "made").read_text().splitlines()) == 1
    assert {file.name for file in tmp_path.iterdir()} <= {"a.npz", "a.npz.lock", "made"}


def test_a_broken_cache_is_made_anew(tmp_path):
    path = tmp_path / "a.npz"
    expected = read_cached(path)
    for content in (b"", b"no zip", path.read_bytes()[:1000]):
        path.write_bytes(content)
        assert read_cached(path) == expected
    assert len((tmp_path / "made").read_text().splitlines()) == 4


def test_a_pickle_in_the_cache_is_not_loaded(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, images=np.array([print], dtype=object))
    assert read_cached(path) == make_counted(path)["images"].sum()


def test_without_a_place_to_write_the_images_are_made_each_time(tmp_path):
    (tmp_path / "file").write_text("")
    arrays = digits.cached(tmp_path / "file" / "a.npz", lambda: {"images": np.ones(3, np.uint8)})
    assert arrays["images"].sum() == 3
