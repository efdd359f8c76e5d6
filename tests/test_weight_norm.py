"""Weight normalization against its equation, its initialization against one done by hand, and mean-only BatchNorm."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.nn.mean_only import MeanOnlyBatchNorm

F64 = torch.float64
NUM = 5  # channels
SPLITS = {"uneven": (3, 1, 2), "empty": (0, 4, 2), "one": (6,), "four": (1, 0, 0, 5)}


def close(actual, wanted):
    torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


LAYERS = {
    "1d": (nn.Conv1d, {"groups": 2}, (4, 6, 3)),
    "2d": (nn.Conv2d, {}, (4, 6, 3)),
    "3d": (nn.Conv3d, {"bias": False}, (4, 6, 2)),
    "transposed": (nn.ConvTranspose2d, {}, (4, 6, 2)),
    "linear": (nn.Linear, {}, (4, 6)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_weight_is_that_of_the_equation(kind):
    cls, options, arguments = LAYERS[kind]
    layer = cls(*arguments, **options, dtype=F64)
    weight, before = layer.weight, layer.weight.detach().clone()
    norm = nn.BatchNorm1d(6, dtype=F64)
    syncbn.convert(nn.Sequential(layer, norm), "wn")
    close(layer.weight, before)
    g, v = layer.parametrizations.weight.parameters()
    assert v is weight
    over = [dim for dim in range(v.dim()) if dim != (1 if kind == "transposed" else 0)]
    assert g.numel() == 6
    with torch.no_grad():
        g.uniform_(0.5, 2)
        v.normal_()
    dw = torch.randn_like(v)
    dg, dv = torch.autograd.grad(layer.weight, (g, v), dw)
    length = v.square().sum(over, keepdim=True).sqrt()
    wanted = (dw * v).sum(over, keepdim=True) / length
    close(layer.weight, g * v / length)
    close(dg, wanted)  # Salimans & Kingma 2016, equation 3
    close(dv, g / length * dw - g * wanted / length**2 * v)


def test_frozen_weights_and_checkpoints_of_torchs_old_hook():
    model = nn.Sequential(nn.Conv2d(3, NUM, 1), nn.BatchNorm2d(NUM))
    model[0].weight.requires_grad_(False)
    syncbn.convert(model, "wn")
    assert not any(p.requires_grad for p in model[0].parametrizations.parameters())
    v, g = torch.randn(NUM, 3, 1, 1), torch.rand(NUM, 1, 1, 1)
    model.load_state_dict({"0.weight_g": g, "0.weight_v": v, "0.bias": torch.ones(NUM), "1.bias": torch.ones(NUM)})
    syncbn.revert(model)
    torch.testing.assert_close(model[0].weight, g * v / v.norm(dim=1, keepdim=True))
    assert not model[0].weight.requires_grad


class Residual(nn.Module):
    """A convolution that runs twice, a residual, a linear layer over positions, and dropout and BatchNorm beside."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, NUM, 3, padding=1)
        self.norm = nn.BatchNorm2d(NUM)
        self.conv = nn.Conv2d(NUM, NUM, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(NUM, affine=False)
        self.fc = nn.Linear(NUM, 4)
        self.norm3 = nn.BatchNorm1d(4)
        self.plain = nn.BatchNorm1d(4, momentum=0.5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        for _ in range(2):
            x = x + self.norm2(self.conv(x))
        y = self.fc(x.flatten(2).transpose(1, 2)).transpose(1, 2)  # (N, 4, positions)
        return self.plain(self.norm3(y)) + self.norm3.bias.view(-1, 1)


def by_hand(model, x):
    """Initialize an unconverted model in float64: returns g, bias and the outputs of each normalized layer."""

    def start(t, dim, bias):
        over = [d for d in range(t.dim()) if d != dim]
        std = t.var(over, correction=0).sqrt()
        shape = [-1 if d == dim else 1 for d in range(t.dim())]
        no_bias = t - bias.view(shape)
        y = no_bias / std.view(shape) + bias.view(shape)
        return y, std, -y.mean(over), shape

    with torch.no_grad():
        zero = torch.zeros(NUM, dtype=F64)
        t, std1, b1, shape = start(model.stem(x), 1, model.stem.bias)
        x = (t + b1.view(shape)).relu()
        t, std2, b2, shape = start(model.conv(x), 1, zero)
        x = x + t + b2.view(shape)
        x = x + F.conv2d(x, model.conv.weight / std2.view(-1, 1, 1, 1), padding=1) + b2.view(shape)
        _, std3, b3, _ = start(model.fc(x.flatten(2).transpose(1, 2)), 2, model.fc.bias)
    lengths = [layer.weight.flatten(1).norm(dim=1) for layer in (model.stem, model.conv, model.fc)]
    return [g / std for g, std in zip(lengths, (std1, std2, std3), strict=True)], [b1, b2, b3]


def model_and_images():
    torch.manual_seed(4)
    return Residual().double(), torch.randn(6, 3, 4, 4, dtype=F64) * 3 + 1


def initialized(rank, world_size, split):
    model, x = model_and_images()
    syncbn.convert(model, "wn", exclude=["plain"])
    state = torch.get_rng_state()
    mean = model.plain.running_mean.clone()
    assert syncbn.initialize_weight_norm(model, x.split(split)[rank]) is model
    assert torch.equal(model.plain.running_mean, mean)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks for m in model.modules())
    g = [layer.parametrizations.weight.original0.detach().flatten() for layer in (model.stem, model.conv, model.fc)]
    return g, [norm.bias.detach() for norm in (model.norm, model.norm2, model.norm3)]


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_initialized_as_by_hand_on_the_joined_batch(run, split):
    # plain BatchNorm, of each rank's own images, comes after all layers that are initialized
    results = run(initialized, len(split), split)
    wanted = by_hand(*model_and_images())
    for result in results:
        for mine, theirs in zip(result[0] + result[1], wanted[0] + wanted[1], strict=True):
            close(mine, theirs)
        for mine, first in zip(result[0] + result[1], results[0][0] + results[0][1], strict=True):
            assert torch.equal(mine, first)


@pytest.mark.parametrize("mean_only", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_have_mean_0_and_variance_1_where_they_vary(dtype, mean_only):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(3, NUM, 3), nn.BatchNorm2d(NUM), nn.Dropout())
    x = torch.randn(64, 3, 9, 9) * 4 - 2
    x[:, 2] = 7
    model[0].weight.data[0, :2] = 0  # a channel that sees the constant alone
    syncbn.convert(model.to(dtype), "wn", mean_only=mean_only)
    g = model[0].parametrizations.weight.original0
    before = g[0].item()
    syncbn.initialize_weight_norm(model, x.to(dtype))
    assert not mean_only or not model[1].running_mean.any()
    y = model[:2](x.to(dtype)).double()
    var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    tolerance = 16 * torch.finfo(dtype).eps
    assert g[0].item() == before
    v = model[0].parametrizations.weight.original1
    torch.testing.assert_close(v.flatten(1).norm(dim=1), g.flatten())  # the direction learns as a weight does
    assert var[0] < tolerance
    torch.testing.assert_close(var[1:], torch.ones(NUM - 1, dtype=F64), rtol=tolerance, atol=0)
    torch.testing.assert_close(mean, torch.zeros(NUM, dtype=F64), rtol=0, atol=tolerance * 8)


def test_what_cannot_be_initialized():
    with pytest.warns(UserWarning, match="initialize_weight_norm found no layer of norm 'wn'"):
        syncbn.initialize_weight_norm(nn.Linear(1, 1), torch.randn(2, 1))
    model = syncbn.convert(Residual(), "wn", exclude=["plain"])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="expected a batch on at least one of the ranks, got none on any"):
        syncbn.initialize_weight_norm(model, torch.zeros(0, 3, 4, 4))
    with pytest.raises(RuntimeError, match="channels"):
        syncbn.initialize_weight_norm(model, torch.zeros(2, 1, 4, 4))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not any(m._forward_hooks for m in model.modules())
    model.forward = lambda x: model.norm(model.stem(x))
    with pytest.warns(UserWarning, match="left conv, fc as they were: they did not run"):
        syncbn.initialize_weight_norm(model, torch.randn(2, 3, 4, 4))


def mean_only(momentum=0.3, dtype=F64):
    layer = MeanOnlyBatchNorm(nn.BatchNorm1d(NUM, momentum=momentum, dtype=dtype))
    layer.bias.data.copy_(torch.arange(NUM))
    layer.running_mean.fill_(0.5)
    return layer


def draw(split, masked):
    generator = torch.Generator().manual_seed(6)
    x, dy = (torch.randn(sum(split), NUM, 3, 2, generator=generator, dtype=F64) * 2 + 3 for _ in range(2))
    mask = torch.rand(sum(split), 1, 3, 2, generator=generator) < 0.7 if masked else None
    return x, dy, mask


def mean_only_rank(rank, world_size, split, masked, momentum):
    x, dy, mask = draw(split, masked)
    x = x.split(split)[rank].detach().requires_grad_()
    layer = DistributedDataParallel(mean_only(momentum)) if world_size > 1 else mean_only(momentum)
    arguments = () if mask is None else (mask.split(split)[rank],)
    for _ in range(2):
        y = layer(x, *arguments)
    (y * dy.split(split)[rank]).sum().backward()
    layer = getattr(layer, "module", layer)
    return y.detach(), x.grad, layer.bias.grad * world_size, layer.running_mean, layer.num_batches_tracked


CASES = [(split, False, 0.3) for split in SPLITS.values()] + [(SPLITS["empty"], True, None)]


@pytest.mark.parametrize(("split", "masked", "momentum"), CASES)
def test_the_mean_of_all_ranks(run, split, masked, momentum):
    results = run(mean_only_rank, len(split), split, masked, momentum)
    x, dy, mask = draw(split, masked)
    x.requires_grad_()
    w = torch.ones_like(x[:, :1]) if mask is None else mask.to(F64)
    mean = (x * w).sum((0, 2, 3)) / w.sum()
    bias = torch.arange(NUM, dtype=F64, requires_grad=True)
    y = torch.where(w > 0, x - mean.view(-1, 1, 1) + bias.view(-1, 1, 1), 0)
    dx, dbias = torch.autograd.grad(y, (x, bias), dy)
    running = torch.full((NUM,), 0.5, dtype=F64)
    for step in (1, 2):
        running = running + (mean.detach() - running) * (1 / step if momentum is None else momentum)
    close(torch.cat([result[0] for result in results]), y.detach())
    close(torch.cat([result[1] for result in results]), dx)
    for _, _, grad, running_mean, num in results:
        close(grad, dbias)  # of DDP, times the ranks
        close(running_mean, running)
        assert num == 2


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_mean_only_alone(dtype):
    layer = mean_only(dtype=torch.float32 if dtype == torch.bfloat16 else dtype)
    assert list(layer.state_dict()) == ["bias", "running_mean", "num_batches_tracked"]
    assert isinstance(layer, syncbn.SyncBatchNorm)
    x = (torch.randn(4, NUM, 6) + 3).to(dtype)
    wide = x.double()
    tolerance = {"rtol": 0, "atol": 8 * torch.finfo(dtype).eps}
    bias = torch.arange(NUM, dtype=F64).view(-1, 1)
    y = layer.eval()(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), wide - 0.5 + bias, **tolerance)
    y = layer.train()(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), wide - wide.mean((0, 2)).view(-1, 1) + bias, **tolerance)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert torch.equal(twin.eval()(x), layer.eval()(x))
    layer.reset_parameters()
    assert not any(t.any() for t in layer.state_dict().values())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        layer.train()(x[:1, :, :1])
    with pytest.raises(ValueError, match=f"expected an input of {NUM} channels"):
        layer(x[:, :2])


def test_mean_only_without_running_statistics_takes_the_batch_always():
    model = nn.Sequential(nn.Linear(2, NUM), nn.BatchNorm1d(NUM, affine=False, track_running_stats=False))
    layer = syncbn.convert(model, "wn", mean_only=True)[1]
    assert list(layer.state_dict()) == ["bias"]
    x = torch.randn(4, NUM)
    for training in (True, False):
        torch.testing.assert_close(layer.train(training)(x), x - x.mean(0))


def test_what_is_done_to_statistics():
    layer = mean_only()
    model = nn.Sequential(nn.BatchNorm1d(NUM, dtype=F64), layer)
    batches = [torch.randn(n, NUM, dtype=F64) for n in (3, 4)]
    syncbn.update_bn_stats(model, batches)
    normalized = torch.cat([F.batch_norm(x, None, None, training=True) for x in batches])
    close(layer.running_mean, normalized.mean(0))
    assert layer.running_var is None
    before = copy.deepcopy(model.state_dict())
    syncbn.average_bn_stats(model)  # of one rank
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    syncbn.freeze(model).train()
    close(model[1](batches[0]), batches[0] - layer.running_mean + layer.bias)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    [_, row] = syncbn.audit(syncbn.unfreeze(model), batches[0], per_rank_batch_size=1, world_size=4).rows
    assert (row.name, row.num_features, row.count) == ("1", NUM, 1)


def averaged(rank, world_size):
    layer = mean_only()
    layer.running_mean.fill_(rank)
    other = nn.BatchNorm1d(2)
    other.running_mean.fill_(-rank)
    other.running_var.fill_(4 * rank)
    syncbn.average_bn_stats(nn.Sequential(layer, other))
    return layer.running_mean, other.running_mean, other.running_var


def test_means_are_averaged_over_ranks(run):
    for mean, other, var in run(averaged, 2):
        assert (mean == 0.5).all()
        assert (other == -0.5).all()
        assert (var == 2).all()


def test_groups_of_mean_only():
    model = nn.Sequential(nn.Linear(2, NUM), syncbn.SyncBatchNorm(NUM, process_group=2))
    assert syncbn.convert(model, "wn", mean_only=True)[1].process_group == 2
    assert syncbn.convert(model, "wn", mean_only=True, process_group=4)[1].process_group == 4
    assert type(model[1]) is MeanOnlyBatchNorm
    assert syncbn.revert(model)[1].process_group == 2
