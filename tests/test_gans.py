"""GANs and other losses on gradients: penalties, several forwards in turn, a discriminator that passes gradients."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from versions import ONE_COPY_OF_BUFFERS

import syncbn

SPLITS = [[3, 3], [5, 1], [1, 5, 0]]


def generator():
    torch.manual_seed(1)
    layers = [nn.ConvTranspose2d(4, 6, 4), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 3, 4, 2, 1), nn.Tanh()]
    return nn.Sequential(*layers).double()


def critic():
    torch.manual_seed(2)
    layers = [nn.Conv2d(3, 6, 4, 2, 1), nn.BatchNorm2d(6), nn.LeakyReLU(0.2), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5)]
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(20, 1)).double()


def draw(step, *shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def inputs(step, size):
    """Real images, noise, and where between real and fake the penalty is taken."""
    return draw(step, size, 3, 8, 8), draw(step + 50, size, 4, 1, 1), draw(step + 70, size, 1, 1, 1).sigmoid()


def part(tensors, sizes, rank):
    return [x.split(sizes)[rank] for x in tensors]


def wgan_gp(make, fakes, critics, steps, batches, scale):
    """Train as in Gulrajani et al. 2017, algorithm 1; the losses are sums times ``scale``."""
    adam = torch.optim.Adam(critics.parameters(), lr=1e-3, betas=(0.0, 0.9))
    adam_fakes = torch.optim.Adam(fakes.parameters(), lr=1e-3, betas=(0.0, 0.9))
    for step in range(steps):
        real, noise, mix = make(batches(step))
        fake = fakes(noise).detach()
        between = (mix * real + (1 - mix) * fake).requires_grad_()
        slope = torch.autograd.grad(critics(between).sum(), between, create_graph=True)[0]
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().sum()
        loss = critics(fake).sum() - critics(real).sum() + 10 * penalty
        adam.zero_grad()
        (loss * scale).backward()
        adam.step()
        adam_fakes.zero_grad()
        (-critics(fakes(noise)).sum() * scale).backward()
        adam_fakes.step()


def wgan_gp_rank(rank, world_size, sizes):
    fakes, critics = (DistributedDataParallel(syncbn.convert(build())) for build in (generator, critic))
    size = sum(sizes)
    wgan_gp(lambda x: part(x, sizes, rank), fakes, critics, 3, lambda step: inputs(step, size), world_size / size)
    return fakes.module.state_dict(), critics.module.state_dict()


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_wgan_gp_under_ddp_equals_one_process(run, sizes):
    fakes, critics = generator(), critic()
    wgan_gp(lambda x: x, fakes, critics, 3, lambda step: inputs(step, sum(sizes)), 1 / sum(sizes))
    for states in run(wgan_gp_rank, len(sizes), sizes):
        # Adam divides by the size of the gradient, so an entry of 1e-6 shows its rounding of 1e-16 as 1e-10
        torch.testing.assert_close(states, (fakes.state_dict(), critics.state_dict()), rtol=1e-7, atol=1e-8)


def penalty_gradients(model, real, scale, penalize):
    real.requires_grad_()
    slope = torch.autograd.grad(model(real).sum(), real, create_graph=True)[0]
    (penalize(slope) * scale).backward()
    return [None if p.grad is None else p.grad for p in model.parameters()] + [real.grad]


def r1(slope):
    """Mescheder et al. 2018: the penalty on real images alone, without any loss beside it."""
    return slope.square().sum()


def r1_rank(rank, world_size, sizes):
    model = syncbn.convert(critic())
    return penalty_gradients(model, part(inputs(0, sum(sizes)), sizes, rank)[0].clone(), 1.0, r1)


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_r1_penalty_alone(run, sizes):
    *expected, dx = penalty_gradients(critic(), inputs(0, sum(sizes))[0], 1.0, r1)
    results = run(r1_rank, len(sizes), sizes)
    for i, gradient in enumerate(expected):
        if gradient is not None:
            close(sum(result[i] for result in results), gradient)
    close(torch.cat([result[-1] for result in results]), dx)


def real_then_fake(model, real, fake, scale):
    """Two forwards in turn, then one backward: the statistics of the second overwrite what the first left."""
    loss = (nn.functional.softplus(-model(real)).sum() + nn.functional.softplus(model(fake)).sum()) * scale
    loss.backward()


def real_then_fake_rank(rank, world_size, sizes, options):
    model = DistributedDataParallel(syncbn.convert(critic()), **options)
    size = sum(sizes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        real, fake = part((draw(step, size, 3, 8, 8), draw(step + 9, size, 3, 8, 8)), sizes, rank)
        optimizer.zero_grad()
        real_then_fake(model, real, fake, world_size / size)
        optimizer.step()
    return model.module.state_dict()


@pytest.mark.parametrize("options", [{}, ONE_COPY_OF_BUFFERS], ids=str)
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_real_and_fake_in_turn_with_buffer_broadcasts(run, sizes, options):
    """DDP's copy of rank 0's buffers between the forwards changes nothing that backward needs (pytorch#66504)."""
    model = critic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        real_then_fake(model, draw(step, sum(sizes), 3, 8, 8), draw(step + 9, sum(sizes), 3, 8, 8), 1 / sum(sizes))
        optimizer.step()
    for state in run(real_then_fake_rank, len(sizes), sizes, options):
        close(state, model.state_dict())


def through_frozen(fakes, judge, noise, scale, mode):
    judge.requires_grad_(False)
    judge.train(mode == "train")
    if mode == "frozen statistics":
        judge.train()
        syncbn.freeze(judge)
    (nn.functional.softplus(-judge(fakes(noise))).sum() * scale).backward()


def through_frozen_rank(rank, world_size, sizes, mode):
    fakes, judge = DistributedDataParallel(syncbn.convert(generator())), syncbn.convert(critic())
    through_frozen(fakes, judge, inputs(3, sum(sizes))[1].split(sizes)[rank], world_size, mode)
    assert all(p.grad is None for p in judge.parameters())
    return [p.grad for p in fakes.parameters()], fakes.module.state_dict(), judge.state_dict()


@pytest.mark.parametrize("mode", ["train", "eval", "frozen statistics"])
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_gradients_pass_through_a_frozen_discriminator(run, sizes, mode):
    fakes, judge = generator(), critic()
    through_frozen(fakes, judge, inputs(3, sum(sizes))[1], 1, mode)
    for gradients, *states in run(through_frozen_rank, len(sizes), sizes, mode):
        close(gradients, [p.grad for p in fakes.parameters()])
        close(states, [fakes.state_dict(), judge.state_dict()])


class PlainBatchNorm(nn.BatchNorm1d):
    """Batch normalization in plain operators: torch's own has no third derivative."""

    def forward(self, x):
        var, mean = torch.var_mean(x, 0, correction=0)
        return (x - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias


def solution(norm):
    torch.manual_seed(3)
    layers = [nn.Linear(2, 5), norm(5), nn.Tanh(), nn.Linear(5, 4), norm(4), nn.Tanh(), nn.Linear(4, 1)]
    return nn.Sequential(*layers).double()


def heat_equation(model, points):
    """A physics-informed loss, u_t = u_xx: its gradient is a third derivative."""
    points = points.clone().requires_grad_()
    (first,) = torch.autograd.grad(model(points).sum(), points, create_graph=True)
    (second,) = torch.autograd.grad(first[:, 0].sum(), points, create_graph=True)
    ((first[:, 1] - second[:, 0]) ** 2).sum().backward()
    return [torch.zeros(1).double() if p.grad is None else p.grad for p in model.parameters()], points.grad


def heat_equation_rank(rank, world_size, sizes):
    return heat_equation(syncbn.convert(solution(nn.BatchNorm1d)), draw(4, sum(sizes), 2).split(sizes)[rank])


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_third_derivatives(run, sizes):
    expected, expected_dx = heat_equation(solution(PlainBatchNorm), draw(4, sum(sizes), 2))
    results = run(heat_equation_rank, len(sizes), sizes)
    largest = max(gradient.abs().max() for gradient in expected)
    for parts, gradient in zip(zip(*(result[0] for result in results), strict=True), expected, strict=True):
        assert (sum(parts) - gradient).abs().max() < 1e-10 * largest
    torch.testing.assert_close(torch.cat([dx for _, dx in results]), expected_dx, rtol=1e-8, atol=1e-9 * largest)


def close(actual, expected):
    """float64 end to end: what differs is the order of sums."""
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)
