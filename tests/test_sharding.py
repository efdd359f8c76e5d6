"""Batches: sizes add up, and every image is read as often as it should be."""

import itertools

import pytest
import torch

from experiment.training.sharding import BatchPlan, TrainBatches, eval_batches, plan_batches
from experiment.training.world import World


def joined(parts):
    return list(itertools.chain.from_iterable(parts))


def lists(sampler):
    return [draw.indices for draw in sampler]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_the_default_keeps_the_global_batch(world_size, accumulate):
    plan = plan_batches(world_size, accumulate=accumulate)
    assert plan.global_batch_size == 32
    assert plan.per_rank_batch_size * world_size * accumulate == 32


def test_a_per_rank_batch_size_decides():
    assert plan_batches(4, per_rank_batch_size=2).global_batch_size == 8
    assert plan_batches(4, per_rank_batch_size=2, accumulate=4).global_batch_size == 32


@pytest.mark.parametrize(
    ("world_size", "sizes", "message"),
    [
        (3, {}, r"global_batch_size=32 does not divide over 3 ranks.*30 or 33"),
        (2, {"global_batch_size": 36, "accumulate": 4}, "2 ranks x 4 accumulated.*32 or 40"),
        (64, {}, "choose data.global_batch_size=64,"),
        (1, {"per_rank_batch_size": 0}, "per_rank_batch_size.*at least 1, got 0"),
        (1, {"global_batch_size": -1}, "global_batch_size.*got -1"),
        (1, {"accumulate": 0}, "accumulate.*got 0"),
        (1, {"per_rank_batch_size": 2.5}, "whole number"),
    ],
)
def test_impossible_sizes(world_size, sizes, message):
    with pytest.raises(ValueError, match=message):
        plan_batches(world_size, **sizes)


def test_the_world_of_torchrun(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert World.from_env() == World(0, 1, 1, by_torchrun=False)
    for name, value in {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 4, "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, str(value))
    world = World.from_env()
    assert (world.rank, world.world_size, world.num_nodes, world.by_torchrun) == (5, 8, 2, True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="same --nproc-per-node"):
        World.from_env()


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (4, 1), (2, 2), (1, 4)])
def test_a_step_reads_the_same_images_at_any_world_size(world_size, accumulate):
    plan = plan_batches(world_size, global_batch_size=8, accumulate=accumulate)
    whole = TrainBatches(67, BatchPlan(8))
    ranks = [TrainBatches(67, plan, rank) for rank in range(world_size)]
    simulated = TrainBatches(67, plan, rank=None)
    for sampler in (whole, simulated, *ranks):
        sampler.set_epoch(3)
    micro = [joined(parts) for parts in zip(*map(lists, ranks), strict=True)]  # joined over the ranks
    steps = [joined(micro[i : i + accumulate]) for i in range(0, len(micro), accumulate)]
    assert steps == lists(whole) == lists(simulated)
    assert {len(sampler) for sampler in ranks} == {67 // 8 * accumulate}
    assert all(len(batch) == plan.per_rank_batch_size for sampler in ranks for batch in lists(sampler))
    assert len(simulated) == len(lists(simulated)) == 8
    assert len({draw.seed for sampler in (whole, *ranks) for draw in sampler}) == 1


def test_dealing_drops_what_does_not_fill_a_batch_of_all_ranks():
    plan, order = BatchPlan(2, world_size=2, accumulate=2), torch.arange(15)
    assert plan.deal(order, 0) == [[0, 1], [4, 5], [8, 9]]
    assert plan.deal(order, 1) == [[2, 3], [6, 7], [10, 11]]
    assert plan.deal(order, None) == [list(range(8)), list(range(8, 12))]
    assert plan.deal(order[:3], 0) == plan.deal(order[:3], None) == []


def test_one_process_that_stands_for_several(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    world = World.from_env(simulate=4)
    assert (world.world_size, world.num_ranks, World.from_env().num_ranks) == (1, 4, 1)
    for wrong in (0, True, "4"):
        with pytest.raises(ValueError, match="a number of ranks, at least 1"):
            World.from_env(simulate=wrong)
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match="one process that stands for 4 ranks, torchrun started 2"):
        World.from_env(simulate=4)


def test_every_epoch_has_its_own_order_and_the_seed_decides_it():
    def order(seed, epoch):
        sampler = TrainBatches(64, BatchPlan(8), seed=seed)
        sampler.set_epoch(epoch)
        return joined(lists(sampler))

    assert order(0, 1) == order(0, 1)
    assert sorted(order(0, 1)) == list(range(64))
    assert order(0, 0) != order(0, 1)
    assert order(0, 1) != order(1, 1)


def test_too_few_images_for_one_step():
    with pytest.raises(ValueError, match="one step of 32 training images, got 31"):
        TrainBatches(31, BatchPlan(16, world_size=2))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_images", [0, 1, 3, 7, 12])
def test_evaluation_reads_every_image_once(world_size, num_images):
    samplers = [eval_batches(range(num_images), 3, rank, world_size) for rank in range(world_size)]
    read = [index for sampler in samplers for batch in sampler for index in batch.indices]
    assert sorted(read) == list(range(num_images))
    assert all(len(sampler) == len(list(sampler)) >= 1 for sampler in samplers)
