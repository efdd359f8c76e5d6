"""What needs no exchange, in every mixture of dtypes that training takes: eval mode, and one process."""

import itertools

import pytest
import torch
from torch import nn

import syncbn
from syncbn.functional import sync_batch_norm

HALF, FULL, WIDE = torch.bfloat16, torch.float32, torch.float64
# of input, parameters and statistics
MIXES = [*itertools.product([HALF, torch.float16], [HALF, torch.float16, FULL], [HALF, torch.float16, FULL, WIDE])]
MIXES = [mix for mix in MIXES if mix[1] in (mix[0], FULL)] + [(FULL, FULL, WIDE), (WIDE, WIDE, FULL)]
LIMITS = {HALF: 2e-2, torch.float16: 3e-3, FULL: 2e-5, WIDE: 1e-5}  # of wide inputs the statistics are float32


def make(mix, affine):
    layer = syncbn.SyncBatchNorm(3, affine=affine)
    if affine:
        layer.weight.data, layer.bias.data = (torch.tensor(v).to(mix[1]) for v in ([0.5, -1.0, 2.0], [1.0, 0.0, -1.0]))
    layer.running_mean, layer.running_var = (torch.tensor(v).to(mix[2]) for v in ([0.5, 0.0, 1.0], [1.0, 2.0, 0.5]))
    return layer


def plain_of(layer):
    plain = nn.BatchNorm2d(3, affine=layer.affine, dtype=torch.float64)
    plain.load_state_dict({k: v.double() for k, v in layer.state_dict().items()})
    return plain


def step(layer, x, dy, is_training):
    layer.train(is_training)
    x = x.detach().requires_grad_()
    y = layer(x)
    (y * dy).sum().backward()
    return [y.detach(), x.grad, *[p.grad for p in layer.parameters()], layer.running_mean, layer.running_var]


def check(layer, mix, is_training):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(4, 3, 5, 5, generator=generator).to(mix[0]) for _ in range(2))
    expected = step(plain_of(layer), x.double(), dy.double(), is_training)
    actual = step(layer, x, dy, is_training)
    assert actual[0].dtype == actual[1].dtype == mix[0]
    limit = max(LIMITS[dtype] for dtype in mix)
    for value, wanted in zip(actual, expected, strict=True):
        scale = wanted.abs().max().item()
        torch.testing.assert_close(value.double(), wanted, rtol=limit, atol=limit * scale)
    assert layer.running_mean.dtype == mix[2]


# without parameters the statistics say what dtype the layer has
CASES = [*((mix, True) for mix in MIXES), *((mix, False) for mix in MIXES if mix[1] == mix[2])]


@pytest.mark.parametrize("is_training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("mix", "affine"), CASES, ids=str)
def test_every_mixture_of_dtypes(mix, affine, is_training):
    check(make(mix, affine), mix, is_training)


def rank_step(rank, world_size):
    for mix in MIXES:
        layer = make(mix, affine=True)
        x = torch.randn(2, 3, 4, 4).to(mix[0])
        layer(x).square().sum().backward()
        y = layer.eval()(x)
        torch.testing.assert_close(y.double(), plain_of(layer).eval()(x.double()), rtol=5e-2, atol=5e-2)
        values = layer.running_mean, layer.running_var, layer.weight, layer.bias
        assert torch.equal(y, sync_batch_norm(x, *values))


def test_what_ranks_train_with_evaluates(run):
    run(rank_step, 2)
