"""Autocast, GradScaler, whole models in half types, and channels_last: what runs beside the layer's own precision."""

import contextlib
import itertools
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn

SPLITS = [[3, 3], [5, 1], [1, 5, 0]]
HALF = [torch.bfloat16, torch.float16]
EPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # half a unit in the last place, relative
FLOOR = 2e-6  # float32 in the layer and its reference


def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4, momentum=None)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 2))


def batch(step, size):
    return torch.randn(size, 3, 6, 6, generator=torch.Generator().manual_seed(step)) * 2 + 0.5


class Norms(contextlib.ExitStack):
    """Record the input and output of every BatchNorm, with the gradients that reach them."""

    def __init__(self, model):
        super().__init__()
        self.seen = {}
        for name, layer in model.named_modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                self.enter_context(layer.register_forward_hook(partial(self._keep, name)))

    def _keep(self, name, _, args, y):
        x = args[0]
        for tensor in (x, y):
            if tensor.requires_grad:
                tensor.retain_grad()
        self.seen[name] = (x, y)

    def values(self):
        return {n: (x.detach(), y.detach(), x.grad, y.grad) for n, (x, y) in self.seen.items()}


def check_layers(results, model, options):
    """Compare every layer, on what reached it on the ranks, with one nn.BatchNorm in float64 on the joined batch.

    So the rounding of the layers around it does not count: what is left is one rounding of each value. Input and
    output gradients of a half type are rounded once; statistics that are float32 are not rounded to it at all.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
            continue
        seen = [result["layers"][name] for result in results]
        x, y, dx, dy = (torch.cat(parts).double() for parts in zip(*seen, strict=True))
        reference = nn.BatchNorm2d(x.shape[1], momentum=layer.momentum, dtype=torch.float64)
        reference.load_state_dict(layer.state_dict())
        x.requires_grad_()
        expected = reference(x)
        expected.backward(dy)
        eps = EPS.get(options["dtype"], FLOOR)
        assert all(part[1].dtype == options["dtype"] for part in seen)
        within(y, expected.detach(), eps)
        within(dx, x.grad, eps, scale=max(x.grad.abs().max(), dy.abs().max()))
        buffers = EPS[options["dtype"]] if options["half_buffers"] else FLOOR
        for result in results:
            for statistic in ("running_mean", "running_var"):
                actual = result["state"][f"{name}.{statistic}"]
                assert actual.dtype == (options["dtype"] if options["half_buffers"] else torch.float32)
                within(actual.double(), getattr(reference, statistic), buffers)
            assert result["state"][f"{name}.num_batches_tracked"] == 1


def within(actual, expected, eps, scale=None):
    """An error of 1.5 units, relative to the largest value: rounding of the result, and of the pass in float32."""
    error = (actual - expected).abs().max()
    assert error <= 3 * eps * (expected.abs().max() if scale is None else scale), error


def autocast_step(rank, world_size, dtype, sizes):
    model = DistributedDataParallel(syncbn.convert(net()))
    x = batch(0, sum(sizes)).split(sizes)[rank]
    with Norms(model.module) as norms:
        with torch.autocast("cpu", dtype):
            loss = (model(x).float() ** 3).sum()
        loss.backward()
    return {
        "layers": norms.values(),
        "state": model.module.state_dict(),
        "gradients": {n: p.grad for n, p in model.module.named_parameters()},
    }


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_autocast(run, sizes, dtype):
    results = run(autocast_step, len(sizes), dtype, sizes)
    check_layers(results, net(), {"dtype": dtype, "half_buffers": False})
    model = net()  # and the whole, against one process under autocast: the same up to rounding
    with torch.autocast("cpu", dtype):
        loss = (model(batch(0, sum(sizes))).float() ** 3).sum() / len(sizes)
    loss.backward()
    for name, parameter in model.named_parameters():
        error = (results[0]["gradients"][name] - parameter.grad).norm()
        assert error < 20 * EPS[dtype] * max(parameter.grad.norm(), 1.0), name
        assert results[0]["gradients"][name].dtype == torch.float32


def half_step(rank, world_size, dtype, sizes):
    model = syncbn.convert(net()).to(dtype)
    x = batch(0, sum(sizes)).split(sizes)[rank].to(dtype)
    with Norms(model) as norms:
        (model(x).float() ** 3).sum().backward()
    assert all(p.grad.dtype == dtype for p in model.parameters())
    return {"layers": norms.values(), "state": model.state_dict()}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_whole_model_in_a_half_type(run, sizes, dtype):
    """model.bfloat16() makes the buffers half too; the statistics are computed in more and rounded once."""
    check_layers(run(half_step, len(sizes), dtype, sizes), net().to(dtype), {"dtype": dtype, "half_buffers": True})


def scaled(rank, world_size, sizes):
    """Three steps; in the second, rank 0 alone overflows float16."""
    model = DistributedDataParallel(syncbn.convert(net()).double())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scales = []
    for step in range(3):
        x = batch(step, sum(sizes)).split(sizes)[rank].double()
        loss = model(x).sigmoid().square().sum() * world_size / sum(sizes)
        if step == 1 and rank == 0:
            loss = loss * torch.inf
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales, model.module.state_dict()


@pytest.mark.parametrize("sizes", [[3, 3], [1, 5, 0]], ids=str)
def test_grad_scaler_skips_a_step_on_all_ranks(run, sizes):
    model = net().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        loss = model(batch(step, sum(sizes)).double()).sigmoid().square().sum() / sum(sizes)
        optimizer.zero_grad()
        loss.backward()
        if step != 1:
            optimizer.step()
    for scales, state in run(scaled, len(sizes), sizes):
        assert scales == [8.0, 4.0, 4.0]
        torch.testing.assert_close(state, model.state_dict(), rtol=1e-8, atol=1e-9)


def autocast_scaled(rank, world_size, sizes):
    """The usual loop: float16 autocast, scaled loss, float32 parameters."""
    model = DistributedDataParallel(syncbn.convert(net()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=1)  # overflows at first
    scales = [scaler.get_scale()]
    for step in range(12):
        x = batch(step % 2, sum(sizes)).split(sizes)[rank]
        with torch.autocast("cpu", torch.float16):
            loss = model(x).float().sigmoid().square().sum() * world_size / sum(sizes)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales, model.module.state_dict()


def test_float16_overflow_in_backward_is_seen_by_the_scaler_on_all_ranks(run):
    (scales, state), (other_scales, other_state) = run(autocast_scaled, 2, [5, 1])
    assert scales == other_scales
    assert scales[1] < scales[0]  # the gradient overflowed on the way,
    assert max(b / a for a, b in itertools.pairwise(scales)) == 2  # and later it did not
    torch.testing.assert_close(state, other_state, rtol=0, atol=0)
    assert all(torch.isfinite(value).all() for value in state.values())


def blocks():
    """A residual block: what is added must agree in layout, too."""
    torch.manual_seed(0)
    return nn.ModuleList(
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
        for _ in range(2)
    ).double()


def channels_last_step(rank, world_size, sizes):
    model = syncbn.convert(blocks()).to(memory_format=torch.channels_last)
    x = draw_last(sizes).split(sizes)[rank].clone(memory_format=torch.preserve_format).requires_grad_()
    y, kept = x, []
    for block in model:
        y = y + block(y)
        kept += [y, block[1](block[0](y))]
    (y**3).sum().backward()
    # the convolution of an empty batch has no layout to speak of
    assert len(x) == 0 or all(t.is_contiguous(memory_format=torch.channels_last) for t in kept)
    return y.detach(), x.grad, [p.grad for p in model.parameters()], model.state_dict()


def draw_last(sizes):
    x = torch.randn(sum(sizes), 4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("sizes", [[3, 3], [2, 4, 0]], ids=str)
def test_channels_last_model(run, sizes):
    model, x = blocks(), draw_last(sizes).contiguous().requires_grad_()
    y = x
    for block in model:
        y = y + block(y)
        block[1](block[0](y))
    (y**3).sum().backward()
    results = run(channels_last_step, len(sizes), sizes)
    close(torch.cat([result[0] for result in results]), y)
    close(torch.cat([result[1] for result in results]), x.grad)
    close([sum(parts) for parts in zip(*(r[2] for r in results), strict=True)], [p.grad for p in model.parameters()])
    for result in results:
        close(result[3], model.state_dict())


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9, check_stride=False)
