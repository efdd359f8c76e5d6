"""How the networks of the experiments on textbook sentences are built and trained, and what is measured."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from experiment.claims import (
    images,
    learning,
    networks,
    recurrent,
    shift,
    training,
)
from experiment.claims.images import Split
from experiment.claims.registry import BY_NAME
from experiment.claims.runs import Run
from experiment.claims.training import Recipe


def test_training_is_sgd_with_this_schedule():
    generator = torch.Generator().manual_seed(0)
    split = Split(torch.randn(10, 3, generator=generator), torch.randint(2, (10,), generator=generator))
    net = nn.Linear(3, 2)
    start = [p.detach().clone() for p in net.parameters()]
    recipe = Recipe(0.5, num_steps=10, batch_size=4, weight_decay=0.1, warmup=0.2)
    order = list(training.batches(10, recipe, seed=5))
    losses = training.train(net, split, recipe, seed=5)
    weight, bias = (p.clone().requires_grad_() for p in start)
    momenta = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for step in range(10):
        rate = 0.5 * ((step + 1) / 2 if step < 2 else (1 + math.cos(math.pi * (step - 2) / 8)) / 2)
        loss = F.cross_entropy(split.images[order[step]] @ weight.T + bias, split.labels[order[step]])
        assert losses[step] == pytest.approx(loss.item(), rel=1e-5)
        gradients = torch.autograd.grad(loss, [weight, bias])
        with torch.no_grad():
            for p, m, g, decay in zip((weight, bias), momenta, gradients, (0.1, 0.0), strict=True):
                p.sub_(m.mul_(0.9).add_(g + decay * p), alpha=rate)
    torch.testing.assert_close(net.weight, weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net.bias, bias, rtol=1e-5, atol=1e-6)
    assert len({*torch.cat(order[:2]).tolist()}) == 8  # an epoch shows an image once
    assert not torch.equal(order[0], order[2])


def test_a_diverged_network_errs_by_chance():
    split = Split(torch.randn(40, 3), torch.arange(40) % 10)
    net = nn.Linear(3, 10)
    with torch.no_grad():
        net.weight.fill_(math.inf)
    assert training.error_and_loss(net, split) == (0.9, math.inf)
    assert len(training.train(net, split, Recipe(0.1, num_steps=5), 0)) == 1


def test_steps_to_a_loss():
    losses = [1.0] * 30 + [0.0] * 30
    assert learning.steps_to(0.5, losses) == 40
    assert learning.steps_to(-1.0, losses) is None
    assert learning.steps_to(2.0, losses[:19]) is None  # diverged before there was a mean


def test_statistics_of_all_training_images():
    """The loss is that of the step's images, normalized with the statistics of all of them."""
    generator = torch.Generator().manual_seed(0)
    split = Split(torch.randn(12, 3, generator=generator), torch.randint(2, (12,), generator=generator))
    net, recipe = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)), Recipe(0.1, 1, 4, normalize_all=True)
    normalized = (split.images - split.images.mean(0)) / (split.images.var(0, correction=0) + 1e-5).sqrt()
    [indices] = training.batches(12, recipe, seed=5)
    expected = F.cross_entropy(net[1](normalized)[indices], split.labels[indices]).item()
    assert training.train(net, split, recipe, seed=5) == [pytest.approx(expected, rel=1e-5)]


@pytest.mark.parametrize("net", ["plain", "residual"])
def test_gradients_of_the_first_and_last_hidden_layers(net):
    """Without norm at the start, by hand."""
    run = Run("gradients", {"net": net, "activation": "relu", "arm": "none", "depth": 3}, 0)
    measured = BY_NAME["gradients"].measure(run)["start"]
    torch.manual_seed(0)
    make = networks.residual_mlp if net == "residual" else networks.mlp
    started = make("none", "relu", depth=3, width=128)
    *hidden, last = [p.detach().double().requires_grad_() for p in started.parameters() if p.dim() > 1]
    bias = started[-1].bias.detach().double()
    data = images.digits().train.first(128)
    x = data.images.double()
    if net == "residual":
        x = x @ hidden.pop(0).T
    for weight in hidden:
        x = x + x.relu() @ weight.T if net == "residual" else (x @ weight.T).relu()
    loss = F.cross_entropy(x @ last.T + bias, data.labels)
    gradients = torch.autograd.grad(loss, hidden)
    assert measured == pytest.approx(math.log10(gradients[0].norm() / gradients[-1].norm()))


def test_the_measured_shift_is_that_of_the_inputs():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(4))
    x, measured = torch.randn(50, 4), shift.Shift()
    with measured.around(0, net, x):
        pass
    assert measured.mean() == 0
    with measured.around(20, net, x), torch.no_grad():
        net[0].weight.mul_(1.5)
    stds, means = x.std(0), x.mean(0)
    expected = math.sqrt((0.25 * (stds**2 + means**2)).sum() / (stds**2).sum())
    assert measured.values[1] == pytest.approx(expected, rel=1e-5)
    with measured.around(21, net, x):
        net[0].weight.data.mul_(9)
    assert len(measured.values) == 2
    assert measured.mean(20) == 0  # of step 0 alone
    assert measured.mean(21) == measured.mean() == pytest.approx(expected / 2, rel=1e-5)


def test_noise_behind_batch_norm():
    torch.manual_seed(0)
    layer, x = networks.NoisyBatchNorm(64), torch.randn(32, 64, 8, 8)
    y, z = layer(x).detach(), layer(x).detach()
    mean, std = y.mean((0, 2, 3)), y.std((0, 2, 3))
    assert 0.2 < mean.std() < 0.4  # that of (-1/2, 1/2) is 0.29
    assert 1.0 < std.min() < std.max() < 1.35
    assert (y - z).abs().max() > 0.1  # anew in every step
    layer.eval()
    expected = 1.125 * F.batch_norm(x, layer.running_mean, layer.running_var)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arm", ["none", *recurrent.FORMS, "ln", "gn"])
def test_recurrent_networks(arm):
    """By hand, with the definition of each arm, at its initial weights in training mode."""
    torch.manual_seed(0)
    net, x = recurrent.PixelRNN(arm).double(), torch.randn(6, 64, dtype=torch.float64)
    w, u = net.from_input.weight, net.from_state.weight
    inputs = x.view(6, 16, 4) @ w.T

    def norm(v, dims):
        return (v - v.mean(dims, keepdim=True)) / (v.var(dims, correction=0, keepdim=True) + 1e-5).sqrt()

    small = torch.tensor(0.1).double()  # rounded to float32 first
    if arm == "bn_input":
        inputs = norm(inputs, (0, 1))
    state = torch.zeros(6, 64, dtype=torch.float64)
    for step in range(16):
        a, b = inputs[:, step], state @ u.T
        if arm == "bn_separate":
            a, b = small * norm(a, (0,)), small * norm(b, (0,))
        state = a + b
        if arm in ("bn_shared", "bn_per_step"):
            state = norm(state, (0,)) * small
        if arm == "ln":
            state = norm(state, (1,))
        if arm == "gn":
            state = norm(state.view(6, 8, 8), (2,)).flatten(1)
        state = state.tanh()
    expected = state @ net.classifier.weight.T + net.classifier.bias
    torch.testing.assert_close(net(x), expected, rtol=1e-9, atol=1e-10)


def test_arms_start_from_the_same_weights():
    arms = ("none", "bn", "ln", "gn", "ghost_4")
    images_only = ("none", "bn", "gn", "noisy_bn", "ghost_4")
    residual = partial(networks.residual_mlp, activation="relu", depth=2, width=8)
    forms = ("none", *recurrent.FORMS, "ln", "gn")
    makes = ((networks.mlp, arms), (residual, arms), (networks.resnet, images_only), (recurrent.PixelRNN, forms))
    for make, names in makes:
        started = []
        for arm in names:
            torch.manual_seed(4)
            net = make(arm)
            weights = [p.detach().clone() for p in net.parameters() if p.dim() > 1]
            started.append([*weights, torch.rand(3)])  # nor has an arm drawn more than another
        assert len({len(weights) for weights in started}) == 1
        for weights in started[1:]:
            assert all(torch.equal(*pair) for pair in zip(weights, started[0], strict=True))
    torch.manual_seed(4)
    wanted_weights = [p.clone() for p in networks.mlp("bn").parameters() if p.dim() > 1]
    torch.manual_seed(4)
    scaled = networks.mlp("bn", scale=3.0)[0].weight
    torch.testing.assert_close(scaled, 3 * wanted_weights[0])
