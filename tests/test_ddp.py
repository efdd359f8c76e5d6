"""DistributedDataParallel on CPU: gradients, buffers, and what its buffer broadcasts do to statistics."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from versions import ONE_COPY_OF_BUFFERS

import syncbn
from syncbn.compat import DDP_OPTIONS


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2), nn.BatchNorm1d(2)).double()


def batch(step, size=12):
    return torch.randn(size, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(100 + step))


def part_of(x, rank, world_size):
    """Uneven parts, the last one empty where it can be."""
    bounds = [0, *[5 + r for r in range(world_size - 2)], len(x), len(x)] if world_size > 2 else [0, 5, len(x)]
    return x[bounds[rank] : bounds[rank + 1]]


def train(rank, world_size, steps, options):
    model = DistributedDataParallel(syncbn.convert(net(seed=rank)), **options)  # DDP takes rank 0's weights
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        x = part_of(batch(step), rank, world_size)
        loss = (model(x) ** 3).sum() * world_size / 12  # DDP averages over ranks
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.module.state_dict()


@pytest.mark.parametrize("options", [{}, ONE_COPY_OF_BUFFERS, {"static_graph": True}], ids=str)
@pytest.mark.parametrize("world_size", [2, 3])
def test_training_equals_one_process(run, world_size, options):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(4):
        optimizer.zero_grad()
        ((model(batch(step)) ** 3).sum() / 12).backward()
        optimizer.step()
    for state in run(train, world_size, 4, options):
        torch.testing.assert_close(state, model.state_dict(), rtol=1e-9, atol=1e-10)


def subgroup_statistics(rank, world_size, options, only_a_submodule):
    model = nn.Sequential(nn.Sequential(nn.BatchNorm1d(3)), nn.Linear(3, 1))
    syncbn.convert(model[0] if only_a_submodule else model, process_group=2)
    if rank == 0:  # rank 0 alone loads a checkpoint
        model[0][0].running_mean.fill_(5.0)
        model[0][0].num_batches_tracked.fill_(7)
    ddp = DistributedDataParallel(model, **options)
    loaded = (model[0][0].running_mean.clone(), model[0][0].num_batches_tracked.clone())
    mine = copy.deepcopy(model[0][0].running_mean)
    for step in range(3):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step)) + rank // 2
        pair = [torch.empty_like(x) for _ in range(world_size)]
        dist.all_gather(pair, x)
        whole = torch.cat(pair[rank // 2 * 2 : rank // 2 * 2 + 2])
        mine = 0.9 * mine + 0.1 * whole.mean(0)
        ddp(x).square().sum().backward()
    return loaded, mine, model[0][0].running_mean.clone()


@pytest.mark.parametrize("options", [{}, ONE_COPY_OF_BUFFERS], ids=str)
@pytest.mark.parametrize("only_a_submodule", [False, True])
def test_subgroups_keep_their_statistics_and_get_what_rank_0_loaded(run, options, only_a_submodule):
    results = run(subgroup_statistics, 4, options, only_a_submodule)
    for loaded, expected, actual in results:
        assert torch.equal(loaded[0], torch.full((3,), 5.0))
        assert loaded[1] == 7
        torch.testing.assert_close(actual, expected)
    assert torch.equal(results[0][2], results[1][2])
    assert not torch.allclose(results[0][2], results[2][2])


def loads_on_rank_0(rank, world_size):
    model = syncbn.convert(net(seed=rank))
    if rank == 0:
        model[1].running_var.fill_(3.0)
    DistributedDataParallel(model, **DDP_OPTIONS)
    return model[1].running_var


def test_world_layers_get_what_rank_0_loaded(run):
    for running_var in run(loads_on_rank_0, 2):
        assert (running_var == 3).all()


def accumulate(rank, world_size, accumulation):
    """Gradient accumulation under no_sync: every micro-batch is normalized over all ranks."""
    model = DistributedDataParallel(syncbn.convert(net()))
    for i in range(accumulation):
        x = batch(i)[rank::world_size]
        if i < accumulation - 1:
            with model.no_sync():
                (model(x) ** 3).sum().backward()
        else:
            (model(x) ** 3).sum().backward()
    return [p.grad * world_size for p in model.parameters()], model.module.state_dict()


def test_accumulation_under_no_sync(run):
    model = net()
    for i in range(3):
        (model(batch(i)) ** 3).sum().backward()
    for gradients, state in run(accumulate, 2, 3):
        torch.testing.assert_close(gradients, [p.grad for p in model.parameters()], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(state, model.state_dict(), rtol=1e-9, atol=1e-10)


def join(rank, world_size):
    model = DistributedDataParallel(syncbn.convert(net()))

    def steps():
        with model.join():
            for _ in range(2 + rank):
                model(batch(rank)).pow(2).sum().backward()

    with pytest.raises(ValueError, match=r"cannot run under DDP\.join"):
        steps()
    dist.barrier()  # no rank leaves while another is in DDP's own exchange


def test_join_is_refused_on_every_rank(run):
    run(join, 2, timeout=40)


def evaluate_on_rank_0(rank, world_size):
    model = syncbn.convert(net())
    if rank == 0:
        model.eval()(batch(0))
    dist.barrier()


def test_eval_on_one_rank_does_not_hang(run):
    run(evaluate_on_rank_0, 2, timeout=40)
