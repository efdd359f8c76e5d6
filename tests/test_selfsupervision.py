"""Self-supervision: teachers that are copies without gradients, and heads that see one sample per rank."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn

SPLITS = [[1, 1], [4, 2], [3, 0, 3]]


def student():
    """Encoder, projector and predictor of BYOL (Grill et al. 2020) and SimSiam (Chen & He 2021), small."""
    torch.manual_seed(0)
    encoder = [nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU()]
    projector = [nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6, affine=False)]
    predictor = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 6))
    return nn.ModuleDict({"online": nn.Sequential(*encoder, *projector), "predictor": predictor}).double()


class Learner(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, views):
        zs = [self.model["online"](view) for view in views]
        return zs, [self.model["predictor"](z) for z in zs]


def views(step, size):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 5, dtype=torch.float64, generator=generator)
    return [x + 0.3 * torch.randn(size, 5, dtype=torch.float64, generator=generator) for _ in range(2)]


def distance(p, z):
    return -F.cosine_similarity(p, z, dim=1).sum()


def byol(learner, model, make, scale, steps=3):
    """The teacher starts as a deep copy, runs in training mode without gradients, and follows by averaging."""
    teacher = copy.deepcopy(model["online"]).requires_grad_(False)
    assert teacher.training
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        pair = make(step)
        with torch.no_grad():
            targets = [teacher(view) for view in pair]
        _, (p0, p1) = learner(pair)
        optimizer.zero_grad()
        ((distance(p0, targets[1]) + distance(p1, targets[0])) * scale).backward()
        optimizer.step()
        with torch.no_grad():
            for mine, theirs in zip(teacher.parameters(), model["online"].parameters(), strict=True):
                mine.lerp_(theirs, 0.1)
    return model.state_dict(), teacher.state_dict()


def byol_rank(rank, world_size, sizes):
    model, size = syncbn.convert(student()), sum(sizes)
    learner = DistributedDataParallel(Learner(model))
    return byol(learner, model, lambda s: [v.split(sizes)[rank] for v in views(s, size)], world_size / size)


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_teacher_without_gradients_in_training_mode(run, sizes):
    model, size = student(), sum(sizes)
    expected = byol(Learner(model), model, lambda s: views(s, size), 1 / size)
    for states in run(byol_rank, len(sizes), sizes):
        # at two samples in all, each channel is close to (-1, 1) and the gradient nearly cancels
        torch.testing.assert_close(states, expected, rtol=1e-6, atol=1e-7)


def copied_from_ddp(rank, world_size):
    """The copy is made of the wrapped model's module, after it has trained."""
    ddp = DistributedDataParallel(syncbn.convert(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))).double())
    x = views(0, 6)[0][rank::world_size]
    (ddp(x) ** 3).sum().backward()
    teacher = copy.deepcopy(ddp.module)
    with torch.no_grad():
        teacher(x + 1)
    assert not torch.equal(teacher[1].running_mean, ddp.module[1].running_mean)
    return teacher.state_dict(), ddp.module.state_dict()


def test_teacher_copied_from_a_wrapped_student_keeps_to_itself(run):
    first, second = run(copied_from_ddp, 2)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).double()
    x = views(0, 6)[0]
    model(x)
    teacher = copy.deepcopy(model)
    teacher(x + 1)
    close(first, (teacher.state_dict(), model.state_dict()))


def simsiam_rank(rank, world_size, sizes):
    model, size = syncbn.convert(student()), sum(sizes)
    pair = [v.split(sizes)[rank] for v in views(0, size)]
    learner = DistributedDataParallel(Learner(model))
    (z0, z1), (p0, p1) = learner(pair)
    ((distance(p0, z1.detach()) + distance(p1, z0.detach())) * world_size).backward()
    return [z0.detach(), z1.detach()], [p.grad for p in model.parameters()], model.state_dict()


@pytest.mark.parametrize("sizes", [[1, 1, 1], [4, 2], [3, 0, 3]], ids=str)
def test_projection_head_without_parameters(run, sizes):
    """One sample per rank: nn.BatchNorm1d refuses it on each, all together are a batch."""
    model = student()
    (z0, z1), (p0, p1) = Learner(model)(views(0, sum(sizes)))
    (distance(p0, z1.detach()) + distance(p1, z0.detach())).backward()
    results = run(simsiam_rank, len(sizes), sizes)
    for view, z in enumerate((z0, z1)):
        close(torch.cat([zs[view] for zs, _, _ in results]), z)
    for _, gradients, state in results:
        close(gradients, [p.grad for p in model.parameters()])
        close(state, model.state_dict())


def barlow_twins(z0, z1, size, exchange):
    """Zbontar et al. 2021: the correlation of the views over the whole batch should be the identity."""
    correlation = exchange(z0.T @ z1) / size
    off = correlation - torch.diag(correlation.diagonal())
    return (correlation.diagonal() - 1).square().sum() + 0.1 * off.square().sum()


class SumWithLocalGradient(torch.autograd.Function):
    """What the method's own code does: all_reduce in place; DDP's mean then counts each rank's loss once."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, dy):
        return dy


def barlow_rank(rank, world_size, sizes):
    model, size = syncbn.convert(student()["online"]), sum(sizes)
    z0, z1 = (model(v.split(sizes)[rank]) for v in views(0, size))
    barlow_twins(z0, z1, size, SumWithLocalGradient.apply).backward()
    return [p.grad for p in model.parameters()], model.state_dict()


@pytest.mark.parametrize("sizes", [[1, 1, 1], [4, 2], [3, 0, 3]], ids=str)
def test_barlow_twins_equals_one_process(run, sizes):
    model = student()["online"]
    z0, z1 = (model(view) for view in views(0, sum(sizes)))
    barlow_twins(z0, z1, sum(sizes), lambda x: x).backward()
    results = run(barlow_rank, len(sizes), sizes)
    close([sum(parts) for parts in zip(*(r[0] for r in results), strict=True)], [p.grad for p in model.parameters()])
    for _, state in results:
        close(state, model.state_dict())


def close(actual, expected):
    """float64 end to end: what differs is the order of sums."""
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)
