"""The data module: batches of indices in, normalized images out, shared over the ranks."""

import torch

from experiment.training.datasets.sources import DigitsOnPhotos
from experiment.training.image_set import ImageSet
from experiment.training.sharding import Draw
from experiment.training.world import World


def small(tmp_path, **kwargs):
    data = DigitsOnPhotos(str(tmp_path), 70, 20, 30, mean=[0.5] * 3, std=[0.25] * 3, **kwargs)
    data.load()
    return data


def test_image_set_serves_draws_of_indices():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 2, 2)
    labels = torch.arange(5)
    for transform in (None, lambda image: image + 10):
        dataset = ImageSet(images, labels, transform)
        batch = dataset[Draw([3, 1], 0)]
        assert batch[0][:, 0, 0, 0].tolist() == ([3, 1] if transform is None else [13, 11])
        assert batch[1].tolist() == [3, 1]
        assert dataset[Draw([], 0)][0].shape == (0, 3, 2, 2)


def test_data_module_serves_channels_last_normalized_images(tmp_path):
    data = small(tmp_path)
    images, labels = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert images.shape == (32, 3, 28, 28)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64
    raw = data.splits.train.images[next(iter(data.train_batches)).indices]
    torch.testing.assert_close(images, (raw / 255 - 0.5) / 0.25)
    assert [len(loader.dataset) for loader in data.test_dataloader()] == [30, 70]
    assert sum(len(labels) for _, labels in data.val_dataloader()) == 20


def test_ranks_share_the_training_images(tmp_path):
    parts = [small(tmp_path, world=World(rank, 2, 2)) for rank in range(2)]
    read = [[index for batch in part.train_batches for index in batch.indices] for part in parts]
    assert not set(read[0]) & set(read[1])
    assert len(read[0]) == len(read[1]) == 32


def test_validation_is_left_out_where_there_is_none(tmp_path):
    data = DigitsOnPhotos(str(tmp_path), 70, 0, 30, mean=[0.5] * 3, std=[0.25] * 3)
    data.load()
    assert data.val_dataloader() == []


def test_an_image_is_augmented_alike_on_every_rank():
    def noisy(image):
        return image + torch.randint(100, image.shape, dtype=torch.uint8)

    dataset = ImageSet(torch.zeros(5, 3, 4, 4, dtype=torch.uint8), torch.arange(5), noisy)
    state = torch.get_rng_state()
    whole = dataset[Draw([0, 1, 2, 3], 7)][0]
    torch.manual_seed(1)
    parts = [dataset[Draw(indices, 7)][0] for indices in ([2, 3], [0], [1])]
    assert torch.equal(torch.cat([parts[1], parts[2], parts[0]]), whole)
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(dataset[Draw([0], 8)][0][0], whole[0])  # another epoch
    torch.set_rng_state(state)
    dataset[Draw([0], 7)]
    assert torch.equal(torch.get_rng_state(), state)


def test_statistics_come_from_the_same_images_at_any_world_size(tmp_path):
    sizes = {"per_rank_batch_size": 2}
    ranks = [small(tmp_path, world=World(rank, 2, 2), **sizes) for rank in range(2)]
    simulated = small(tmp_path, world=World(simulate=2), accumulate=2, **sizes)
    read = [torch.cat([images for images, _ in part.statistics_batches(22)]) for part in (*ranks, simulated)]
    assert [len(images) for images in read] == [10, 10, 20]
    assert torch.equal(torch.cat(read[:2]).sum(0), read[2].sum(0))
    assert torch.equal(read[2][:2], read[0][:2])
