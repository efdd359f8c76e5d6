"""ops/cuda.py on CPU stand-ins for the CUDA operators, which are as strict about dtypes as those are."""

import contextlib
import math
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules._functions import SyncBatchNorm as NativeFunction
from torch.utils._python_dispatch import TorchDispatchMode

import syncbn
from syncbn import compat, functional
from syncbn.distributed import exchange
from syncbn.ops import backends, cpu, cuda, reference, selfcheck
from syncbn.ops.autograd import alike
from syncbn.ops.layout import SUM_DTYPE, per_channel
from syncbn.ops.reference import Running

HALVES = (torch.float16, torch.bfloat16)
# float64 and float32: what the core promises; half types: their own rounding, of values up to 4
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SYNCS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "index.Tensor", "unique")
ALLOCATIONS = ("aten.empty", "aten.new_empty", "aten.empty_like")


def dims(x):
    return [0, *range(2, x.dim())]


def sum_dtype(x):
    return SUM_DTYPE.get(x.dtype, x.dtype)


def update_stats(x, running_mean, running_var, momentum):
    assert (running_mean, running_var) == (None, None)
    var, mean = torch.var_mean(x.double(), dims(x), correction=0)
    return mean.to(sum_dtype(x)), var.to(sum_dtype(x))


def stats(x, eps):
    mean, var = update_stats(x, None, None, 0.0)
    return mean, (var + eps).rsqrt()


def gather_stats(x, means, invstds, running_mean, running_var, momentum, eps, counts):
    """Merge what the ranks gathered, as nn.SyncBatchNorm does."""
    assert counts.dtype == running_mean.dtype
    n = counts[:, None] / counts.sum()
    mean = (means * n).sum(0)
    var = ((invstds**-2 - eps + (means - mean) ** 2) * n).sum(0)
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(var * counts.sum() / (counts.sum() - 1), momentum)
    return mean, (var + eps).rsqrt()


def elemt(x, weight, bias, mean, invstd, eps):
    assert mean.dtype == invstd.dtype == sum_dtype(x)
    types = {p.dtype for p in (weight, bias) if p is not None}
    assert types in (set(), {x.dtype}, {sum_dtype(x)}), types
    y = (x.double() - per_channel(mean, x)) * per_channel(invstd, x)
    y = y if weight is None else y * per_channel(weight, x)
    y = y if bias is None else y + per_channel(bias, x)
    return torch.empty_like(x).copy_(y)


def backward_reduce(dy, x, mean, invstd, weight, input_g, weight_g, bias_g):
    assert mean.dtype == invstd.dtype == sum_dtype(x)
    assert dy.stride() == x.stride()
    assert dy.dtype == x.dtype
    assert weight is None or weight.dtype in (x.dtype, sum_dtype(x))
    sum_dy = dy.double().sum(dims(x))
    sum_dy_xmu = (dy.double() * (x.double() - per_channel(mean, x))).sum(dims(x))
    return (
        sum_dy.to(mean.dtype) if input_g else None,
        sum_dy_xmu.to(mean.dtype) if input_g else None,
        (sum_dy_xmu * invstd).to(weight.dtype) if weight_g else None,
        sum_dy.to(weight.dtype) if bias_g else None,
    )


def backward_elemt(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count):
    assert mean.dtype == invstd.dtype == sum_dy.dtype == sum_dy_xmu.dtype == sum_dtype(x)
    assert weight is None or weight.dtype == sum_dtype(x)
    assert count.dtype == torch.int32
    assert dy.stride() == x.stride()
    n, invstd = count.sum().double(), invstd.double()
    xmu = (x.double() - per_channel(mean, x)) * per_channel(invstd.square() * sum_dy_xmu / n, x)
    scale = invstd if weight is None else invstd * weight
    return torch.empty_like(x).copy_((dy.double() - per_channel(sum_dy / n, x) - xmu) * per_channel(scale, x))


@contextlib.contextmanager
def stand_ins(**others):
    """Put the stand-ins in place, and let the layer run on `cuda`, as it does for CUDA tensors."""
    names = {
        "update_stats": update_stats,
        "stats": stats,
        "gather_stats_with_counts": gather_stats,
        "elemt": elemt,
        "backward_reduce": backward_reduce,
        "backward_elemt": backward_elemt,
    }
    with torch.library._scoped_library("aten", "IMPL") as library, pytest.MonkeyPatch.context() as patch:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
            for name, function in (names | others).items():
                library.impl(f"batch_norm_{name}", function, "CPU")
        patch.setattr(cuda, "_DEVICE_TYPE", "cpu")
        patch.setattr(cuda, "_passed", {})
        patch.setattr(cpu, "kernels_for", lambda *_, **__: None)
        patch.setattr(backends, "kernels_of", {})  # none are kept from before
        yield


@pytest.fixture
def on_stand_ins():
    with stand_ins():
        yield


def laid_out(x, layout):
    return x.contiguous(memory_format=layout) if layout else x


def error(got, true):
    return ((got.double() - true).abs().max() / true.abs().max()).item()


def two_parts(x, dy, weight, bias, eps=1e-5):
    """Run the phases on two uneven parts of a batch; return y, dx, sum_dy, sum_dy_xhat of all of it."""
    parts = list(zip(x.split([1, len(x) - 1]), dy.split([1, len(x) - 1]), strict=True))
    parts = [(x, alike(dy, x)) for x, dy in parts]
    summed = sum(cuda.forward_reduce(x) for x, _ in parts)
    y, statistics = zip(*(cuda.forward_apply(x, summed, weight, bias, Running(), eps) for x, _ in parts), strict=True)
    torch.testing.assert_close(*statistics, rtol=0, atol=0, equal_nan=True)
    dtypes = [None if p is None else p.dtype for p in (weight, bias)]
    reduced = [cuda.backward_reduce(dy, x, statistics[0], *dtypes) for x, dy in parts]
    for packed, grad_weight, grad_bias in reduced:
        for dtype, got, wanted in zip(dtypes, (grad_weight, grad_bias), packed.chunk(2)[::-1], strict=True):
            assert got is None if dtype is None else torch.equal(got, wanted.to(dtype))
    sums = sum(packed for packed, *_ in reduced)
    assert summed.dtype == statistics[0].dtype == sums.dtype == torch.float64
    dx = [cuda.backward_apply(dy, x, statistics[0], weight, sums) for x, dy in parts]
    for x, *results in zip((x for x, _ in parts), y, dx, strict=True):
        assert all(r.dtype == x.dtype and r.stride() == x.stride() for r in results)
    return torch.cat(y), torch.cat(dx), *sums.chunk(2)


def whole(x, dy, weight, bias):
    """What one process computes in float64."""
    x, weight, bias = (None if t is None else t.double().clone().requires_grad_() for t in (x, weight, bias))
    one, zero = torch.ones(x.shape[1]).double().requires_grad_(), torch.zeros(x.shape[1]).double().requires_grad_()
    y = torch.nn.functional.batch_norm(x, None, None, weight, bias, True)
    xhat = torch.nn.functional.batch_norm(x.detach(), None, None, one, zero, True)
    dweight, dbias = torch.autograd.grad(xhat, [one, zero], dy.double())
    return y.detach(), *torch.autograd.grad(y, x, dy.double()), dbias, dweight


SHAPES = [
    ((9, 5), None),
    ((4, 5, 7), None),
    ((4, 5, 6, 3), None),
    ((4, 5, 6, 3), torch.channels_last),
    ((3, 5, 2, 3, 4), None),
    ((3, 5, 2, 3, 4), torch.channels_last_3d),
    ((9, 5, 1, 1), None),
]


@pytest.mark.parametrize(("shape", "layout"), SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_phases_match_float64(on_stand_ins, shape, layout, dtype):
    x, dy = laid_out(torch.randn(shape, dtype=dtype) * 2 + 3, layout), torch.randn(shape).to(dtype)
    kinds = [(None, None), (sum_dtype(x), sum_dtype(x)), (sum_dtype(x), None), (None, dtype), (dtype, sum_dtype(x))]
    for kind in kinds:
        weight, bias = (None if k is None else (torch.rand(5) + 0.5).to(k) for k in kind)
        for got, true in zip(two_parts(x, dy, weight, bias), whole(x, dy, weight, bias), strict=True):
            assert error(got, true) < TOLERANCE[dtype], kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mean_100_times_the_deviation(on_stand_ins, dtype):
    x, dy = torch.randn(8, 5, 6, 6).to(dtype) + 100, torch.randn(8, 5, 6, 6).to(dtype)
    for got, true in zip(two_parts(x, dy, None, None), whole(x, dy, None, None), strict=True):
        assert error(got, true) < TOLERANCE[dtype]


def test_dy_of_any_strides(on_stand_ins):
    x = torch.randn(4, 5, 6, 3).contiguous(memory_format=torch.channels_last)
    for dy in (torch.randn(4, 5, 1, 1).expand(4, 5, 6, 3), torch.randn(4, 3, 6, 5).transpose(1, 3)):
        for got, true in zip(two_parts(x, dy, None, None), whole(x, dy, None, None), strict=True):
            assert error(got, true) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("layout", [None, torch.channels_last])
def test_the_variance_comes_out_whole(on_stand_ins, layout):
    """Far below eps, of a constant channel, and at mean/std = 1e4."""
    x = torch.randn(8, 4, 9, 9)
    x[:, 0] *= 1e-5
    x[:, 1] = 1 / 3
    x[:, 2] = 1000 + 0.1 * x[:, 2]
    x = laid_out(x, layout)
    mean, sqmean = (cuda.forward_reduce(x)[:-1] / 648).chunk(2)
    var, true = sqmean - mean**2, x.double().var(dims(x), correction=0)
    assert (var - true)[[0, 2, 3]].abs().le(1e-4 * true[[0, 2, 3]]).all()
    assert true[0] < 2e-10
    assert abs(var[1]) < 1e-15  # a few roundings of mean**2
    y, truth = two_parts(x, x, None, None)[0], whole(x, x, None, None)[0]
    assert (y - truth)[:, 2].abs().max() < 3e-7 * 1e4
    assert (y - truth)[:, [0, 1, 3]].abs().max() < 2e-5


def test_nan_and_inf_stay_visible(on_stand_ins):
    x = torch.randn(4, 3, 5, 5)
    x[0, 0, 0, 0], x[1, 1, 0, 0] = math.nan, math.inf
    y, dx, _, sum_dy_xhat = two_parts(x, torch.randn(4, 3, 5, 5), None, None)
    for channel, is_finite in enumerate([False, False, True]):
        assert y[:, channel].isfinite().all() == is_finite
        assert dx[:, channel].isfinite().any() == is_finite
        assert sum_dy_xhat[channel].isfinite() == is_finite


def test_a_global_count_above_the_int32_range(on_stand_ins):
    x, dy, count = torch.randn(4, 5, 3, 3), torch.randn(4, 5, 3, 3), torch.tensor(3.0 * 2**32).double()
    statistics = torch.cat([torch.randn(5).double(), torch.rand(5).double() + 1, count.view(1)])
    sums = torch.randn(10).double() * count
    true = reference.backward_apply(dy.double(), x.double(), statistics, None, sums)
    assert error(cuda.backward_apply(dy, x, statistics, None, sums), true) < TOLERANCE[torch.float32]


def test_what_it_serves(on_stand_ins, monkeypatch):
    x = torch.randn(4, 3, 5, 5)
    assert cuda.kernels_for(x) is cuda
    assert cuda.kernels_for(x.contiguous(memory_format=torch.channels_last)) is cuda
    assert cuda.kernels_for(x[:0]) is None
    assert cuda.kernels_for(x.transpose(2, 3)) is None
    assert cuda.kernels_for(x[..., ::2]) is None
    assert cuda.kernels_for(x.as_subclass(type("Other", (torch.Tensor,), {}))) is None
    assert cuda.kernels_for(torch.empty(1, device="meta").expand(2, 2**30)) is None  # by the device, and
    monkeypatch.setattr(cuda, "_DEVICE_TYPE", "meta")
    assert cuda.kernels_for(torch.empty(2, 2**30, device="meta")) is None  # by its size
    monkeypatch.setattr(cuda, "_DEVICE_TYPE", "cuda")
    assert cuda.kernels_for(x) is None


def test_the_self_check_runs_once_and_not_while_a_graph_is_captured(on_stand_ins, monkeypatch):
    x, checked, passes = torch.randn(4, 3, 5, 5), [], selfcheck.passes
    monkeypatch.setattr(selfcheck, "passes", lambda *args: checked.append(args[::2]) or passes(*args))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert cuda.kernels_for(x) is None
    assert not checked
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    state = torch.get_rng_state()
    assert cuda.kernels_for(x) is cuda
    assert cuda.kernels_for(x.half()) is cuda
    assert checked == [("syncbn.ops.cuda", x.device)]
    assert torch.get_rng_state().equal(state)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert cuda.kernels_for(x) is cuda


def broken(name, function):
    """Return a stand-in that is wrong where one could overlook it."""
    spoilt = {
        "off by a thousandth": lambda *args: function(*args) * 1.001,
        "NaN": lambda *args: function(*args) * math.nan,
        "only channels last": lambda dy, *rest: function(dy, *rest) * (1.001 if dy.is_contiguous() else 1),
        "only the constant channel": lambda x, *rest: (update_stats(x, *rest)[0], update_stats(x, *rest)[1] + 1e-3),
    }
    return spoilt[name]


@pytest.mark.parametrize(
    ("operator", "how", "found"),
    [
        ("elemt", "off by a thousandth", "forward_apply"),
        ("backward_elemt", "NaN", "backward_apply"),
        ("backward_elemt", "only channels last", "contiguous_format"),
        ("update_stats", "only the constant channel", "forward_reduce"),
        ("backward_reduce", None, "NotImplementedError"),
    ],
)
def test_a_failed_self_check_warns_once_and_the_reference_goes_on(operator, how, found):
    def refuse(*_):
        raise NotImplementedError("not on this device")

    x, layer = torch.randn(4, 3, 5, 5, requires_grad=True), nn.BatchNorm2d(3)
    with stand_ins(**{operator: broken(how, globals()[operator]) if how else refuse}):
        with pytest.warns(RuntimeWarning, match=f"(?s)reference kernels on cpu.*{found}") as caught:
            assert cuda.kernels_for(x) is None
        assert len(caught) == 1
        assert cuda.kernels_for(x) is None  # without another
        kernels = backends.choose(x, None, None, None, None)
        assert kernels is reference
        y, _ = kernels.forward_apply(x.detach(), kernels.forward_reduce(x.detach()), None, None, Running(), 1e-5)
    torch.testing.assert_close(y, layer(x).detach(), rtol=0, atol=2e-5)


def layer_on_a_rank(rank, world_size, dtype, layout):
    """Return what SyncBatchNorm computes on the stand-ins for this rank's part of a batch of 7."""
    x, dy = batch(dtype)
    part = slice(0, 2) if rank == 0 else slice(2, 7)
    x, layer = laid_out(x[part], layout).requires_grad_(), syncbn.SyncBatchNorm(3)
    with stand_ins():
        y = layer(x)
        assert y.grad_fn.kernels is cuda
        y.backward(dy[part])
        assert cuda._passed == {x.device: True}
    assert y.stride() == x.grad.stride() == x.stride()
    grads = x.grad, layer.weight.grad, layer.bias.grad
    return [t.detach().tolist() for t in (y, *grads, layer.running_mean, layer.running_var)]


def batch(dtype):
    generator = torch.Generator().manual_seed(1)
    x, dy = torch.randn(2, 7, 3, 4, 4, generator=generator)
    return (x * 2 + 5).to(dtype), dy.to(dtype)


@pytest.mark.parametrize("layout", [None, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_layer_on_two_ranks(run, dtype, layout):
    ranks = run(layer_on_a_rank, 2, dtype, layout)
    x, dy = batch(dtype)
    x, layer = x.double().requires_grad_(), nn.BatchNorm2d(3).double()
    y = layer(x)
    y.backward(dy.double())
    joined = [torch.tensor(a + b) for a, b in zip(ranks[0][:2], ranks[1][:2], strict=False)][:2]
    grads = [torch.tensor(a) + torch.tensor(b) for a, b in zip(ranks[0][2:4], ranks[1][2:4], strict=True)]
    truth = y.detach(), x.grad, layer.weight.grad, layer.bias.grad
    for got, true in zip([*joined, *grads], truth, strict=True):
        assert error(got, true) < TOLERANCE[dtype]
    assert ranks[0][4:] == ranks[1][4:]
    for got, true in zip(ranks[0][4:], (layer.running_mean, layer.running_var), strict=True):
        assert error(torch.tensor(got), true) < 1e-6  # float32, of the same rounded inputs


class Trace(TorchDispatchMode):
    """Record the operators that are dispatched."""

    def __init__(self):
        super().__init__()
        self.names, self.launches = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        if not func.is_view and not str(func).startswith(ALLOCATIONS):
            self.launches.append(str(func))
        return func(*args, **(kwargs or {}))


def traced(call):
    with Trace() as trace:
        result = call()
    return result, trace


def traces_on_a_rank(rank, world_size):
    """Return traces of both layers' training forward and backward, as they would be under NCCL."""
    gather = compat.all_gather_single
    x, dy, weight, bias = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5), torch.ones(3), torch.zeros(3)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    buffers, group = (torch.zeros(3), torch.ones(3)), dist.group.WORLD
    calls = {
        "native": lambda: NativeFunction.apply(*leaves, *buffers, 1e-5, 0.1, group, world_size),
        "ours": lambda: functional.sync_batch_norm(x, *buffers, weight, bias, True),
    }
    found = {}
    with stand_ins(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "_GATHER_BYTES", 0)
        patch.setattr(dist.ProcessGroup, "_get_backend_name", lambda _: "nccl")
        patch.setattr(dist, gather.__name__, lambda out, *args, **kw: gather(out.flatten(), *args, **kw))
        assert cuda.kernels_for(x) is cuda  # the self-check is over
        for name, call in calls.items():
            y, forward = traced(call)
            _, backward = traced(lambda y=y: torch.autograd.grad(y, leaves, dy))
            found[name] = [(t.names, t.launches) for t in (forward, backward)]
    return found


def test_nothing_waits_for_the_device_and_operators_are_few(run):
    """Beside the function under torch's nn.SyncBatchNorm, whose masks of empty ranks wait for the device.

    Ours launches more small operators: sums of float64 are turned into moments by public operators one by one, where
    torch's layer has one operator, and both phases of backward round the float64 statistics for their operator. The
    native layer's indexing by a mask is dispatched once, and finds the positions inside.
    """
    found = run(traces_on_a_rank, 2)[0]
    for names, _ in found["ours"]:
        assert not [name for name in names if any(sync in name for sync in SYNCS)]
        assert sum(name.startswith("c10d.") for name in names) == 1
    assert sum("index.Tensor" in name for name in found["native"][0][0]) == 3
    (forward, backward), (native_forward, native_backward) = (
        [len(launches) for _, launches in found[name]] for name in ("ours", "native")
    )
    assert forward <= native_forward + 9, found
    assert backward <= native_backward + 5, found


def test_operators_of_the_phases(on_stand_ins):
    x, dy, channel, sums = torch.randn(4, 5, 3, 3), torch.randn(4, 5, 3, 3), torch.rand(4, 5), torch.rand(10).double()
    weight, bias, *running = channel
    statistics = torch.cat([torch.rand(10), torch.tensor([36.0])]).double()
    assert cuda.kernels_for(x) is cuda
    for num_launches, call in (
        (4, lambda: cuda.forward_reduce(x)),
        (9, lambda: cuda.forward_apply(x, statistics, weight, bias, Running(), 1e-5)),
        (15, lambda: cuda.forward_apply(x, statistics, weight, bias, Running(*running, momentum=0.1), 1e-5)),
        (4, lambda: cuda.backward_reduce(dy, x, statistics, weight.dtype, bias.dtype)),
        (4, lambda: cuda.backward_apply(dy, x, statistics, weight, sums)),
    ):
        trace = traced(call)[1]
        assert len(trace.launches) == num_launches, trace.launches
        assert sum("batch_norm" in name for name in trace.launches) == 1  # one pass over x
