"""The sources: what is read from where, and what is said if it is not there."""

import numpy as np
import pytest
import torch
from PIL import Image

from experiment.training.datasets import scenes
from experiment.training.datasets.sources import Cifar10, Digits, DigitScenes, Folder
from experiment.training.image_set import ImageSet, Splits
from experiment.training.sharding import Draw

COLOUR = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


def test_digits_are_served_as_they_are():
    data = Digits(mean=[0.3], std=[0.4])
    data.load()
    sizes = [len(data.splits.train), len(data.splits.val), len(data.splits.test)]
    assert sizes == [1167, 130, 500]
    assert data.example().shape == (2, 1, 8, 8)
    assert data.splits.train.images.max() == 255


def test_scenes_have_a_class_for_every_pixel_and_are_made_once(tmp_path, monkeypatch):
    first = DigitScenes(str(tmp_path), 40, 0, 9, **COLOUR)
    first.load()
    images, labels = first.splits.test[Draw([3, 1], 0)]
    assert (images.shape, labels.shape) == ((2, 3, 32, 32), (2, 32, 32))
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert (first.num_classes, first.val_dataloader()) == (11, [])
    assert next(iter(first.train_dataloader()))[1].shape == (32, 32, 32)
    monkeypatch.setattr(scenes, "digit_scenes", lambda *sizes: pytest.fail("made again"))
    again = DigitScenes(str(tmp_path), 40, 0, 9, **COLOUR)
    again.load()
    assert torch.equal(again.splits.train.images, first.splits.train.images)
    assert torch.equal(again.splits.train.labels, first.splits.train.labels)
    assert (tmp_path / f"digit_scenes-{scenes.RECIPE}-40-0-9.npz").is_file()


def write_cifar10(root, per_file=4):
    root.mkdir()
    rng = np.random.default_rng(0)
    records = rng.integers(256, size=(6 * per_file, 3073), dtype=np.uint8)
    records[:, 0] = np.arange(6 * per_file) % 10
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for name, part in zip(names, np.split(records, 6), strict=True):
        part.tofile(root / name)
    return records


def test_cifar10_reads_the_binary_files(tmp_path):
    records = write_cifar10(tmp_path / "cifar")
    data = Cifar10(str(tmp_path / "cifar"), global_batch_size=4, **COLOUR)
    data.load()
    splits = data.splits
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [18, 2, 4]
    images, labels = splits.train_plain[Draw([5], 0)]
    assert labels.item() == records[5, 0]
    assert images[0, 1, 2, 3] == records[5, 1 + 1024 + 2 * 32 + 3]  # green, row 2, column 3
    assert splits.train[Draw([5, 6], 0)][0].shape == (2, 3, 32, 32)


def test_cifar10_missing_or_broken(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"(?s)data_batch_1.bin.*cs.toronto.edu.*data.root=PATH") as error:
        Cifar10(str(tmp_path / "cifar"), **COLOUR).load()
    assert str(tmp_path / "cifar") in str(error.value)
    write_cifar10(tmp_path / "cifar")
    (tmp_path / "cifar" / "test_batch.bin").write_bytes(b"\x03" * 100)
    with pytest.raises(ValueError, match=r"test_batch.bin to hold records of 3073 bytes.*got 100"):
        Cifar10(str(tmp_path / "cifar"), global_batch_size=4, **COLOUR).load()


def write_folder(root, splits, classes=("cat", "dog")):
    for split in splits:
        for value, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (20 + i, 24), (100 * value,) * 3).save(root / split / name / f"{i}.png")


@pytest.mark.parametrize("splits", [("train", "val"), ("train", "test"), ("train", "val", "test")])
def test_folder_of_images(tmp_path, splits):
    write_folder(tmp_path, splits)
    data = Folder(str(tmp_path), size=16, global_batch_size=2, **COLOUR)
    data.load()
    assert data.num_classes == 2
    images, labels = data.splits.train[Draw([0, 5], 0)]
    assert images.shape == (2, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [0, 1]
    assert images[1].unique().tolist() == [100]
    assert len(data.splits.test) == 6
    assert (data.splits.val is None) == ("val" not in splits)
    assert data.splits.test[Draw([], 0)][0].shape == (0, 3, 16, 16)
    assert len(list(data.train_dataloader())) == 3


@pytest.mark.parametrize("splits", [("train", "val"), ("train", "test"), ("train", "val", "test")])
def test_a_folder_validates_with_other_images_than_it_tests(tmp_path, splits):
    """Where only the test images are left, some of the training images are held out."""
    write_folder(tmp_path, splits)
    data = Folder(str(tmp_path), size=16, global_batch_size=2, eval_split="val", **COLOUR)
    data.load()
    assert data.eval_set is data.splits.val is not data.splits.test
    is_held_out = splits != ("train", "val", "test")
    sizes = [len(part) for part in (data.splits.train, data.splits.train_plain, data.splits.val, data.splits.test)]
    assert sizes == ([5, 5, 1, 6] if is_held_out else [6, 6, 6, 6])
    assert len(list(data.test_dataloader()[0])) == 1


def test_held_out_images_are_no_longer_trained_on():
    images = torch.arange(25, dtype=torch.uint8).view(25, 1, 1, 1)
    whole = ImageSet(images, torch.arange(25))
    splits = Splits(whole, whole, None, whole, num_classes=25).hold_out()
    val, _ = splits.val[Draw(list(range(len(splits.val))), 0)]
    train, labels = splits.train[Draw(list(range(len(splits.train))), 0)]
    assert val.flatten().tolist() == [0, 10, 20]
    assert sorted([*val.flatten().tolist(), *train.flatten().tolist()]) == [*range(25)]
    assert labels.tolist() == train.flatten().tolist()
    assert splits.test is whole


def test_folder_missing_or_of_other_classes(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"(?s)train and val \(or test\).*found none.*data.root=PATH"):
        Folder(str(tmp_path), **COLOUR).load()
    write_folder(tmp_path, ["train"])
    with pytest.raises(FileNotFoundError, match="found train"):
        Folder(str(tmp_path), **COLOUR).load()
    write_folder(tmp_path, ["val"], classes=("cat", "cow"))
    with pytest.raises(ValueError, match=r"differ: \['cow', 'dog'\]"):
        Folder(str(tmp_path), **COLOUR).load()


def test_a_broken_image_is_named(tmp_path):
    write_folder(tmp_path, ["train", "val"])
    (tmp_path / "train" / "cat" / "1.png").write_bytes(b"no image")
    data = Folder(str(tmp_path), size=16, global_batch_size=2, **COLOUR)
    data.load()
    path = tmp_path / "train" / "cat" / "1.png"
    with pytest.raises(ValueError, match=f"cannot read {path}: cannot identify"):
        data.splits.train[Draw([1], 0)]
