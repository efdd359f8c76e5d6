"""The base class of the data modules: batches of a data set's splits, one part per rank, normalized on the device."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from experiment.training.image_set import Batch, ImageSet, Splits
from experiment.training.sharding import Draw, FixedBatches, TrainBatches, eval_batches, plan_batches
from experiment.training.world import World

NUM_PRECISE = 2048  # training images for precise statistics


class ImageData(L.LightningDataModule, ABC):
    """Serve one source of images; a subclass says where they come from.

    Args:
        mean: Per channel, of pixels in 0 to 1; images become `(pixel / 255 - mean) / std`.
        std: Per channel.
        global_batch_size: Images of one optimizer step over all ranks.
        per_rank_batch_size: Images one rank sees at once; None shares the global batch out.
        accumulate: Batches per optimizer step.
        eval_batch_size: Images one rank sees at once in validation and test.
        num_train_eval: Training images on which the training error is measured.
        eval_split: Whose images the evaluation after training reads: test, or val while settings are chosen.
        num_workers: Loader processes per rank.
        world: Rank of this process and number of processes.
        seed: Of the shuffle.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        global_batch_size: int = 32,
        per_rank_batch_size: int | None = None,
        accumulate: int = 1,
        eval_batch_size: int = 250,
        num_train_eval: int = 1_500,
        eval_split: str = "test",
        num_workers: int = 0,
        world: World | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.memory_format = torch.channels_last  # of normalized images; the net's, once there is one
        self.mean, self.std = (torch.tensor(list(value)).view(-1, 1, 1) for value in (mean, std))
        self.world, self.seed = world or World(), seed
        self.eval_batch_size, self.num_train_eval, self.eval_split = eval_batch_size, num_train_eval, eval_split
        self.num_workers = num_workers
        self.eval_in_training_batches = False  # for evaluation with the statistics of the batch
        self.plan = plan_batches(
            self.world.num_ranks,
            global_batch_size=global_batch_size,
            per_rank_batch_size=per_rank_batch_size,
            accumulate=accumulate,
        )

    @abstractmethod
    def make_splits(self) -> Splits:
        """Find, check and open the images.

        Raises:
            FileNotFoundError: they are not there; the message says what was expected where.
        """

    def load(self) -> None:
        """Open the images and check that they make one step; nothing here communicates.

        Raises:
            FileNotFoundError: the images are not there.
            ValueError: there are fewer than one step needs, or none to test.
        """
        if self.eval_split not in ("test", "val"):
            raise ValueError(f"expected eval_split to be test or val, got {self.eval_split!r}")
        self.splits = self.make_splits()
        if self.eval_split == "val" and (not self.splits.val or self.splits.val is self.splits.test):
            self.splits = self.splits.hold_out()
            if self.world.rank == 0:
                print("no validation images but the test images: every tenth training image is held out")
        if not len(self.splits.test):
            raise ValueError("expected at least one test image, got none")
        self.train_batches = TrainBatches(len(self.splits.train), self.plan, self._dealt_to, self.seed)
        shuffle = torch.randperm(len(self.splits.train), generator=torch.Generator().manual_seed(self.seed))
        self.train_eval_indices = shuffle[: self.num_train_eval].tolist()

    @property
    def _dealt_to(self) -> int | None:
        return self.world.rank if self.world.simulate is None else None

    @property
    def eval_set(self) -> ImageSet:
        """The images of `eval_split`, which no training reads."""
        held_out = self.splits.test if self.eval_split == "test" else self.splits.val
        assert held_out is not None
        return held_out

    @property
    def num_classes(self) -> int:
        """Count the classes."""
        return self.splits.num_classes

    def example(self) -> Tensor:
        """Give two normalized training images, `(2, C, H, W)`."""
        return self.normalize(self.splits.train_plain[Draw([0, 0], 0)][0])

    def sample(self, num_images: int) -> Tensor:
        """Give some shuffled and normalized training images, `(num_images, C, H, W)`."""
        order = torch.randperm(len(self.splits.train), generator=torch.Generator().manual_seed(self.seed))
        return self.normalize(self.splits.train[Draw(order[:num_images].tolist(), self.seed)][0])

    def normalize(self, images: Tensor) -> Tensor:
        """Map uint8 to `(pixel / 255 - mean) / std`, in the memory format of the net."""
        self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        pixels = images.to(dtype=torch.float32, memory_format=self.memory_format)
        return pixels.div_(255).sub_(self.mean).div_(self.std)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Normalize on the device: uint8 travels."""
        images, labels = batch
        images = self.normalize(images)
        if self.trainer is not None:  # Lightning converts batches before, when they are integers
            images = self.trainer.precision_plugin.convert_input(images)
        return images, labels

    def train_dataloader(self) -> DataLoader[Batch]:
        """Serve this rank's part of every training step."""
        return self._loader(self.splits.train, self.train_batches)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Serve this rank's part of the validation images, if the source has any."""
        val = self.splits.val
        return [] if val is None else self._eval_loader(val, range(len(val)))

    def test_dataloader(self) -> list[DataLoader[Batch]]:
        """Serve this rank's part of `eval_set`, and of some training images without augmentation."""
        held_out, train = self.eval_set, self.splits.train_plain
        loader = self._eval_loader(held_out, range(len(held_out)))
        return [loader, self._eval_loader(train, self.train_eval_indices)]

    def statistics_batches(self, num_images: int) -> Iterator[Batch]:
        """Serve this rank's part of some shuffled training batches, for statistics, as `training_step` sees them."""
        order = torch.randperm(len(self.splits.train), generator=torch.Generator().manual_seed(self.seed))
        return iter(self._loader(self.splits.train, FixedBatches(self.plan.deal(order[:num_images], self._dealt_to))))

    def statistics_images(self) -> Iterator[Tensor]:
        """Serve this rank's images for precise statistics, normalized, on the device of the running trainer."""
        assert self.trainer is not None
        for batch in self.statistics_batches(max(NUM_PRECISE, self.plan.per_rank_batch_size * self.plan.world_size)):
            images, _ = self.trainer.strategy.batch_to_device(batch)  # normalizes, too
            yield images

    def _eval_loader(self, dataset: ImageSet, indices: Sequence[int]) -> DataLoader[Batch]:
        if not self.eval_in_training_batches:
            world = self.world
            return self._loader(dataset, eval_batches(indices, self.eval_batch_size, world.rank, world.world_size))
        shuffle = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))
        shuffled = torch.tensor(list(indices))[shuffle]
        return self._loader(dataset, FixedBatches(self.plan.deal(shuffled, self._dealt_to)))

    def _loader(self, dataset: ImageSet, batches: Sampler[Draw]) -> DataLoader[Batch]:
        # batch_size=None: the sampler's draws go to the dataset whole, so nothing is collated
        workers = self.num_workers > 0
        options: dict[str, Any] = {"persistent_workers": workers, "pin_memory": workers and torch.cuda.is_available()}
        # a generator of its own, since a resumed run draws from it at other moments
        own = torch.Generator()
        return DataLoader(
            dataset, sampler=batches, batch_size=None, num_workers=self.num_workers, generator=own, **options
        )
