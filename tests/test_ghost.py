"""GhostBatchNorm equals one nn.BatchNorm per split, by slices and by folding into channels."""

import copy

import pytest
import torch
from torch import nn
from versions import torch_norm

import syncbn
from syncbn.nn import ghost
from syncbn.ops.layout import memory_format

SHAPES = [(6, 3), (6, 3, 5), (6, 3, 4, 5), (12, 2, 1, 1), (6, 2, 3, 2, 2)]
LAYOUTS = ["contiguous", "channels_last", "strided"]


@pytest.fixture(params=["slices", "channels"])
def path(request, monkeypatch):
    """Choose the way it is computed, whatever the size."""
    monkeypatch.setattr(ghost, "_MIN_SPLIT", 0 if request.param == "slices" else 10**9)


def lay_out(x, layout):
    if layout == "channels_last" and x.dim() in (4, 5):
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    return torch.stack([x, x], -1)[..., 0] if layout == "strided" else x


def batchnorm(x, **options):
    cls = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[x.dim()]
    return torch_norm(cls, x.shape[1], **options)


def draw(shape, layout="contiguous", dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + torch.arange(shape[1]).view(
        -1, *[1] * (len(shape) - 2)
    )
    return lay_out(x.to(dtype), layout)


def initialize(layer):
    if layer.affine:
        with torch.no_grad():
            layer.weight.copy_(torch.arange(1.0, layer.num_features + 1))
            if layer.bias is not None:
                layer.bias.copy_(torch.arange(0.5, layer.num_features))
    return layer


def separate(x, dys, splits, steps, **options):
    """Run one BatchNorm per split, the same parameters in each; `steps` training steps on scaled inputs."""
    layers = [initialize(batchnorm(x, dtype=torch.float64, **options)) for _ in range(splits)]
    ys, dxs = [], []
    for step in range(steps):
        parts = [p.double().detach().mul(step + 1).requires_grad_() for p in x.chunk(splits)]
        outs = [layer(part) for layer, part in zip(layers, parts, strict=True)]
        ys.append(torch.cat(outs).detach())
        (torch.cat(outs) * dys).sum().backward()
        dxs.append(torch.cat([part.grad for part in parts]))
    return layers, ys, dxs


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}, {"bias": False}, {"momentum": 0.5}])
def test_parity_with_one_batchnorm_per_split(shape, layout, options):
    x, dys = draw(shape, layout), draw(shape, seed=1)
    for splits in (1, 3):
        layers, ys, dxs = separate(x, dys, splits, 2, **options)
        layer = syncbn.GhostBatchNorm(shape[1], splits, dtype=torch.float64, track_per_split=True, **options)
        initialize(layer)
        for step in range(2):
            mine = x.detach().mul(step + 1).requires_grad_()
            y = layer(mine)
            (y * dys).sum().backward()
            torch.testing.assert_close(y.detach(), ys[step], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(mine.grad, dxs[step], rtol=1e-9, atol=1e-9)
            if layout == "channels_last":
                assert y.is_contiguous(memory_format=memory_format(mine))
        for name in ("weight", "bias"):
            if getattr(layer, name) is not None:
                total = sum(getattr(other, name).grad for other in layers)
                torch.testing.assert_close(getattr(layer, name).grad, total, rtol=1e-9, atol=1e-9)
        for name in ("running_mean", "running_var"):
            rows = torch.stack([getattr(other, name) for other in layers])
            torch.testing.assert_close(getattr(layer, f"split_{name}"), rows, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(getattr(layer, name), rows.mean(0), rtol=1e-10, atol=1e-10)
        assert layer.num_batches_tracked == 2


@pytest.mark.usefixtures("path")
def test_second_order():
    layer = initialize(syncbn.GhostBatchNorm(2, 2, dtype=torch.float64, track_running_stats=False))
    x = draw((4, 2, 3)).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))
    y = layer(x)
    first = torch.autograd.grad(y, [x, layer.weight], draw(x.shape, seed=1), create_graph=True)
    assert torch.autograd.grad(sum(g.square().sum() for g in first), layer.weight)[0].abs().max() > 0


@pytest.mark.parametrize("shape", [(8, 8, 96, 96), (8, 4, 3, 3)])  # by slices, and by channels
def test_float32_is_as_exact_as_batchnorm(shape):
    x = draw(shape, dtype=torch.float32) + 100
    layers, [expected], _ = separate(x, draw(shape, seed=1), 4, 1)
    layer = initialize(syncbn.GhostBatchNorm(shape[1], 4, track_per_split=True))
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)
    rows = torch.stack([other.running_var for other in layers])
    torch.testing.assert_close(layer.split_running_var.double(), rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype):
    x = draw((8, 3, 4, 4), dtype=dtype)
    layers, [expected], _ = separate(x, draw(x.shape, seed=1), 2, 1)
    for layer in (syncbn.GhostBatchNorm(3, 2), syncbn.GhostBatchNorm(3, 2).to(dtype)):
        y = initialize(layer)(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), expected, rtol=0.02, atol=0.05)
        mean = torch.stack([other.running_mean for other in layers]).mean(0)
        torch.testing.assert_close(layer.running_mean.double(), mean, rtol=0.02, atol=0.01)


def test_eval_and_state_dict_are_those_of_batchnorm():
    plain, layer = nn.BatchNorm2d(3), syncbn.GhostBatchNorm(3, 4)
    plain(draw((8, 3, 4, 4), dtype=torch.float32))
    assert layer.state_dict().keys() == plain.state_dict().keys()
    layer.load_state_dict(plain.state_dict())
    x = draw((3, 3, 4, 4), dtype=torch.float32)  # no multiple of 4: eval mode does not split
    assert torch.equal(layer.eval()(x), plain.eval()(x))
    layer.reset_running_stats()
    assert torch.equal(layer.running_var, torch.ones(3))
    keys = syncbn.GhostBatchNorm(3, 4, track_per_split=True).state_dict().keys()
    assert keys - plain.state_dict().keys() == {"split_running_mean", "split_running_var"}
    per_split = syncbn.GhostBatchNorm(3, 4, track_per_split=True)
    per_split.load_state_dict(plain.state_dict())
    assert torch.equal(per_split.split_running_mean, plain.running_mean.repeat(4, 1))
    twin = syncbn.GhostBatchNorm(3, 4, track_per_split=True)
    per_split.split_running_var[2] = 7
    twin.load_state_dict(per_split.state_dict())
    assert twin.split_running_var[:, 0].tolist() == [*twin.running_var[:1].repeat(2).tolist(), 7, twin.running_var[0]]


def test_without_running_statistics_eval_splits_too():
    x = draw((6, 3, 4))
    layer = syncbn.GhostBatchNorm(3, 3, dtype=torch.float64, track_running_stats=False, track_per_split=True)
    assert not list(layer.buffers())
    torch.testing.assert_close(layer.eval()(x), layer.train()(x), rtol=0, atol=0)


def test_copies_and_no_grad():
    layer = syncbn.GhostBatchNorm(3, 2, track_per_split=True)
    x = draw((4, 3, 5), dtype=torch.float32)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        assert torch.equal(layer(x), twin(x.clone()))
    assert torch.equal(layer.split_running_mean, twin.split_running_mean)
    assert "num_splits=2" in repr(layer)
    layer.reset_running_stats()
    assert torch.equal(layer.split_running_var, torch.ones(2, 3))


@pytest.mark.usefixtures("path")
def test_an_empty_batch_moves_nothing():
    layer = syncbn.GhostBatchNorm(3, 2)
    y = layer(torch.empty(0, 3, 4, 4))
    assert y.shape == (0, 3, 4, 4)
    assert layer.num_batches_tracked == 1  # as nn.BatchNorm counts it
    assert torch.equal(layer.running_var, torch.ones(3))


def test_compiles_without_a_graph_break():
    layer = syncbn.GhostBatchNorm(3, 2, track_per_split=True)
    twin = copy.deepcopy(layer)
    x = draw((4, 3, 64, 64), dtype=torch.float32)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, twin(x))
    torch.testing.assert_close(layer.split_running_var, twin.split_running_var)


def test_bad_input():
    with pytest.raises(ValueError, match="a whole number of at least 1, got 0"):
        syncbn.GhostBatchNorm(3, 0)
    layer = syncbn.GhostBatchNorm(3, 4)
    with pytest.raises(ValueError, match="a batch that 4 splits divide, got 6"):
        layer(torch.randn(6, 3, 2, 2))
    with pytest.raises(ValueError, match="more than 1 value per channel when training, got 1 in each of 4 splits"):
        layer(torch.randn(4, 3, 1, 1))
    with pytest.raises(ValueError, match="3 channels"):
        layer(torch.randn(4, 2, 2, 2))
