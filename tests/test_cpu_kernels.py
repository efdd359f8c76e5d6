"""ops/cpu.py against formulas in float64: dtypes, layouts, odd sizes, hard numbers, threads, fall-backs, layers."""

import contextlib
import math
import os
import shutil
import subprocess
import sys
import warnings
from unittest import mock

import pytest
import torch
from oracle import compare, make_case, run_case
from oracle import truth as one_process
from torch import nn
from torch._dynamo import compiled_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import syncbn
from syncbn import build, functional
from syncbn.ops import backends, cpu, reference, selfcheck
from syncbn.ops.autograd import alike
from syncbn.ops.layout import SUM_DTYPE, per_channel
from syncbn.ops.reference import Running

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SUM_DTYPES = [torch.float32, torch.float64]
# What the core promises; half types: one rounding of the result, and float32 before it.
TOLERANCE = {torch.float64: (1e-10, 1e-10), torch.float32: (2e-5, 2e-5)}
TOLERANCE |= {torch.float16: (2**-11, 2e-5), torch.bfloat16: (2**-8, 2e-5)}
SHAPES = [
    (2, 1), (7, 3), (64, 17), (33, 64), (5, 1001),
    (1, 3, 1), (4, 17, 5), (3, 64, 33), (2, 3, 8195),
    (1, 3, 4, 4), (2, 1, 5, 7), (3, 17, 1, 1), (2, 64, 7, 7), (3, 3, 29, 3), (5, 24, 2, 3), (1, 8, 31, 17),
    (2, 3, 2, 2, 2), (2, 17, 3, 4, 5), (1, 64, 1, 1, 1),
]  # fmt: skip
NO_COMPILER = "no C++ compiler is installed"

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason=NO_COMPILER)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Build the library once, away from the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.delenv("CXX", raising=False)
        assert kernels_for(torch.ones(2, 3)) is not None
        yield


def kernels_for(x, weight=None, bias=None, running_mean=None, running_var=None):
    return cpu.kernels_for(x, weight, bias, running_mean, running_var)


def lay_out(x, layout):
    """Return x contiguous, or with its channels last in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "last" else x.contiguous()


def draw(shape, dtype=torch.float64, layout="first", mean=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 1.5 + mean
    return lay_out(x.to(dtype), layout)


def dims(x):
    return [0, *range(2, x.dim())]


EPS = 0.1  # one value has no variance


def statistics_of(summed, eps):
    """Compute mean, invstd and count by their formulas."""
    mean, sqmean = (summed[:-1] / summed[-1]).chunk(2)
    return torch.cat([mean, (sqmean - mean.square() + eps).rsqrt(), summed[-1:]])


def summed_for(mean, var, count):
    """Return the sums of ``count`` values with this mean and variance."""
    mean, var = mean.double(), var.double()
    return torch.cat([mean, var + mean.square(), torch.ones(1)]) * count


def truth(x, dy, statistics, weight, bias, sums):
    """Compute the phases by their formulas, in float64."""
    x, dy = x.double(), dy.double()
    mean, invstd, weight, bias = (per_channel(t.double(), x) for t in (*statistics[:-1].chunk(2), weight, bias))
    xhat = (x - mean) * invstd
    mean_dy, mean_dy_xhat = (per_channel(t, x) for t in (sums / statistics[-1]).chunk(2))
    num = x.numel() // x.shape[1]
    return {
        "forward_reduce": torch.cat([x.sum(dims(x)), x.square().sum(dims(x)), torch.tensor([num]).double()]),
        "forward_apply": xhat * weight + bias,
        "backward_reduce": torch.cat([dy.sum(dims(x)), (dy * xhat).sum(dims(x))]),
        "backward_apply": weight * invstd * (dy - mean_dy - xhat * mean_dy_xhat),
    }


def ours(x, dy, summed, weight, bias, sums, eps=EPS):
    """Run the phases; return their results, and the statistics."""
    kernels, dy = kernels_for(x, weight, bias), alike(dy, x)
    y, statistics = kernels.forward_apply(x, summed, weight, bias, Running(), eps)
    dtypes = (None if t is None else t.dtype for t in (weight, bias))
    packed, grad_weight, grad_bias = kernels.backward_reduce(dy, x, statistics, *dtypes)
    for got, true, like in ((grad_weight, packed.chunk(2)[1], weight), (grad_bias, packed.chunk(2)[0], bias)):
        assert got is None if like is None else torch.equal(got, true.to(like.dtype))
    results = {
        "forward_reduce": kernels.forward_reduce(x),
        "forward_apply": y,
        "backward_reduce": packed,
        "backward_apply": kernels.backward_apply(dy, x, statistics, weight, sums),
    }
    return results, statistics


def arguments(x, seed=1):
    """Draw everything but x and dy; the sums are those of three ranks, whose values are distributed as x."""
    num_features = x.shape[1]
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(2, num_features, generator=generator)
    var, mean = torch.var_mean(x.double(), dims(x), correction=0)
    sums = torch.randn(2 * num_features, generator=generator, dtype=torch.float64)
    return summed_for(mean, var, 3 * x.numel() // num_features), weight, bias, sums


def check(x, dy, summed, *rest):
    results, statistics = ours(x, dy, summed, *rest)
    torch.testing.assert_close(statistics, statistics_of(summed, EPS), rtol=1e-13, atol=1e-13)
    for name, true in truth(x, dy, statistics, *rest).items():
        got = results[name]
        if got.dim() == 1:
            assert got.dtype == torch.float64
            rtol = atol = 1e-3 * TOLERANCE[SUM_DTYPE.get(x.dtype, x.dtype)][0]  # products are added without a rounding
            atol *= math.sqrt(x.numel() / x.shape[1])
        else:
            assert (got.dtype, got.stride()) == (x.dtype, torch.empty_like(x).stride())
            rtol, atol = TOLERANCE[x.dtype]
        torch.testing.assert_close(
            got.double(), true, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n} {x.shape}: {m}"
        )


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shape(dtype, layout):
    for shape in SHAPES:
        x, dy = draw(shape, dtype, layout), draw(shape, dtype, layout, seed=2)
        check(x, dy, *arguments(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["first", "last"])
def test_every_half_number(dtype, layout):
    """All 65536 are read and written exactly; a product with one rounding is that of torch."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(2, 8, 64, 64)
    x = lay_out(x, layout)

    def normalized(weight):
        """Scale by ``weight`` alone: the mean is 0, the variance 1."""
        summed = summed_for(torch.zeros(8), torch.ones(8), x.numel() // 8)
        return kernels_for(x, weight).forward_apply(x, summed, weight, None, Running(), 0.0)[0]

    assert torch.equal(normalized(None).nan_to_num(7), x.nan_to_num(7))
    for scale in (1 / 3, 0.77, 1.5, 1000.3, 1e-4):
        y, wanted = normalized(torch.full((8,), scale)), (x.float() * scale).to(dtype)
        assert torch.equal(y.nan_to_num(7), wanted.nan_to_num(7))
        assert torch.equal(y.isnan(), wanted.isnan())


@pytest.mark.parametrize("dtype", [None, *DTYPES], ids=str)
def test_dtypes_of_weight_and_bias(dtype):
    for of_x in DTYPES:
        x, dy = draw((4, 19, 5, 5), of_x), draw((4, 19, 5, 5), of_x, seed=2)
        summed, weight, bias, sums = arguments(x)
        if dtype is None:
            mine, theirs = (None, None), (torch.ones(19), torch.zeros(19))
        else:
            mine = theirs = weight.to(dtype), bias.to(dtype)
        got, statistics = ours(x, dy, summed, *mine, sums)
        true = truth(x, dy, statistics, *theirs, sums)
        for name in ("forward_apply", "backward_apply"):
            rtol, atol = TOLERANCE[of_x]
            torch.testing.assert_close(got[name].double(), true[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("dtype", SUM_DTYPES, ids=str)
@pytest.mark.parametrize("ratio", [100, 1e4])
def test_means_far_from_zero(dtype, layout, ratio):
    """Channel 0 is constant. The rounding of float64 is all that the variance may lose."""
    x, dy = draw((8, 5, 40, 40), dtype, layout, mean=1.5 * ratio), draw((8, 5, 40, 40), dtype, layout, seed=2)
    x[:, 0] = 1.5 * ratio
    _, weight, bias, sums = arguments(x)
    packed = kernels_for(x).forward_reduce(x)
    got, statistics = ours(x, dy, packed, weight, bias, sums, eps=1e-5)
    true = truth(x, dy, statistics, weight, bias, sums)
    true_var, true_mean = torch.var_mean(x.double(), dims(x), correction=0)
    mean, invstd = statistics[:-1].chunk(2)
    torch.testing.assert_close(mean, true_mean, rtol=1e-13, atol=0)
    for var in (reference.moments(packed)[1] / packed[-1], invstd**-2 - 1e-5):
        torch.testing.assert_close(var, true_var, rtol=2e-15 * ratio**2, atol=1e-7)
    unit = 2e-5 if dtype is torch.float32 else 1e-10
    far = 3e-7 if dtype is torch.float32 else 1e-14
    true_invstd = (true_var + 1e-5).rsqrt()
    for name, slope in (("forward_apply", true_invstd * weight), ("backward_apply", weight * true_invstd**2)):
        # times the value's own size, and mean / std of its channel (which is huge where std is 0)
        bound = unit * (1 + true[name].abs()) + far * per_channel((true_mean * slope).abs(), x)
        assert ((got[name] - true[name]).abs() <= bound).all(), name
    assert (got["backward_reduce"] - true["backward_reduce"]).abs().max() <= 1e-12 * ratio * dy.numel() / 5 * 1e3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layout", ["first", "last"])
def test_what_is_not_finite_stays_in_its_channel(bad, layout):
    for shape, place in (((3, 5, 7, 7), (0, 2, 0, 0)), ((3, 5, 7, 7), (2, 2, 6, 6)), ((4, 5, 2, 2), (3, 2, 1, 1))):
        x = draw(shape, torch.float32, layout)
        dy = draw(shape, torch.float32, layout, seed=2)
        x[place] = bad
        finite, zero, one = torch.arange(5) != 2, torch.zeros(5), torch.ones(5)
        both = kernels_for(x, one, zero), reference
        y, wanted = (k.forward_apply(x, k.forward_reduce(x), one, zero, Running(), 1e-5) for k in both)
        for _, statistics in (y, wanted):
            assert torch.equal(statistics[5:-1].isfinite(), finite)
        assert torch.equal(y[0].isnan(), wanted[0].isnan())
        summed = summed_for(zero, one, x.numel() // 5)
        y, wanted = (k.forward_apply(x, summed, one, zero, Running(), 0.0)[0] for k in both)
        assert torch.equal(y.nan_to_num(9, 8, 7), wanted.nan_to_num(9, 8, 7))
        for mine, theirs in ((x, dy), (dy, x)):
            sums, wanted = (k.backward_reduce(mine, theirs, statistics_of(summed, 0.0), None, None)[0] for k in both)
            assert torch.equal(sums.isfinite(), wanted.isfinite())


def make_expanded(shape):
    return torch.tensor(0.7).expand(shape)


def make_permuted(shape):
    return draw(shape[::-1], torch.float32).permute(3, 2, 1, 0)


def make_other_layout(shape):
    return draw(shape, torch.float32, "last")


def make_double(shape):
    return draw(shape, torch.float64)


def make_negative(shape):
    return draw((*shape, 2), torch.float32).view(torch.complex64)[..., 0].conj().imag


def make_zeros(shape):
    return torch._efficientzerotensor(shape)


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize(
    "make", [make_expanded, make_permuted, make_other_layout, make_double, make_negative, make_zeros]
)
def test_dy_as_autograd_may_bring_it(make, layout):
    x, dy = draw((3, 4, 5, 6), torch.float32, layout), make((3, 4, 5, 6))
    summed, weight, bias, sums = arguments(x)
    plain = torch.zeros_like(x).add(dy)
    got, wanted = (ours(x, t, summed, weight, bias, sums)[0] for t in (dy, plain))
    for name in ("backward_reduce", "backward_apply"):
        assert torch.equal(got[name], wanted[name])


@pytest.fixture
def three_threads(same_num_threads):
    torch.set_num_threads(3)


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("shape", [(5, 7, 199, 151), (1, 3, 600, 601), (70001, 13), (3, 30011, 3, 4)], ids=str)
def test_threads(shape, layout, three_threads):
    """Their number changes the order of additions alone, and nothing else does."""
    x, dy = draw(shape, torch.float32, layout), draw(shape, torch.float32, layout, seed=2)
    rest = arguments(x)
    many, again = ours(x, dy, *rest)[0], ours(x, dy, *rest)[0]
    torch.set_num_threads(1)
    one = ours(x, dy, *rest)[0]
    for name in one:
        assert torch.equal(many[name], again[name])
        if one[name].dim() > 1:
            assert torch.equal(many[name], one[name])
        else:
            torch.testing.assert_close(many[name], one[name], rtol=1e-11, atol=1e-9)
    check(x, dy, *rest)


class Subclass(torch.Tensor):
    pass


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(2, 3, 4, device="meta"),
        torch.ones(0, 3, 4),
        torch.ones(2, 6, 4)[:, :3],
        torch.ones(2, 3, 4).expand(2, 3, 4).mT.expand(2, 4, 3)[:1].expand(2, 4, 3),
        torch.ones(2, 3, dtype=torch.int32),
        torch.ones(2, 3, dtype=torch.complex64),
        torch.ones(2, 3).to_sparse(),
        torch.ones(2, 3).as_subclass(Subclass),
        torch.ones(2, 3, 2, dtype=torch.complex64).conj().imag.contiguous().as_subclass(Subclass),
        torch._efficientzerotensor((2, 3)),
    ],
    ids=["meta", "empty", "part", "expanded", "int", "complex", "sparse", "subclass", "other", "zeros"],
)
def test_what_it_does_not_take(x):
    assert kernels_for(x) is None
    assert backends.choose(x, None, None, None, None) is reference


@pytest.mark.parametrize(
    "channel",
    [
        torch.ones(4)[::2],
        torch.ones(1),
        torch.ones(0),
        torch.ones(3),
        torch.ones(1, 2),
        torch.ones(2, dtype=torch.int32),
        torch.ones(2, device="meta"),
        torch.ones(2).to_sparse(),
        torch.ones(2).as_subclass(Subclass),
        torch._neg_view(torch.ones(2)),
    ],
    ids=["strided", "one", "none", "three", "two dimensions", "int", "meta", "sparse", "subclass", "negative"],
)
def test_per_channel_tensors_that_it_does_not_take(channel):
    """They are never read beyond their end: the reference takes them, or says what is wrong."""
    x, plain = torch.ones(3, 2, 4), torch.ones(2)
    assert kernels_for(x, plain, plain, plain, plain) is not None
    for i in range(4):
        tensors = [channel if i == j else plain for j in range(4)]
        assert kernels_for(x, *tensors) is None
        assert backends.choose(x, *tensors) is reference


def test_running_statistics_that_it_does_not_take():
    x, mean, var = torch.ones(3, 2, 4), torch.zeros(2), torch.ones(2)
    with torch.inference_mode():
        made_in_inference_mode = torch.zeros(2), torch.ones(2)
    for running in ((mean, None), (None, var), (mean, var.double()), (mean.half(), var), made_in_inference_mode):
        assert kernels_for(x, None, None, *running) is None
    for dtype in DTYPES:
        assert kernels_for(x, None, None, mean.to(dtype), var.to(dtype)) is not None


def test_per_channel_tensors_that_do_not_fit():
    x = draw((3, 4, 5), torch.float32)
    summed, weight, bias, sums = arguments(x)
    wanted, statistics = kernels_for(x, weight, bias).forward_apply(x, summed, weight, bias, Running(), EPS)

    def forward(weight, bias):
        return backends.choose(x, weight, bias, None, None).forward_apply(x, summed, weight, bias, Running(), EPS)[0]

    torch.testing.assert_close(forward(torch.stack([weight, weight], 1)[:, 0], bias), wanted)
    for short in (weight[:3], weight[:0]):
        with pytest.raises(RuntimeError):
            forward(short, bias)
        with pytest.raises(RuntimeError):
            forward(weight, short)
        with pytest.raises(RuntimeError):
            backends.choose(x, short, None, None, None).backward_apply(x, x, statistics, short, sums)


def test_dispatch_modes_tracers_and_transforms_see_all_operators():
    x = torch.randn(4, 3, 5)
    assert kernels_for(x) is not None
    assert kernels_for(nn.Parameter(x)) is not None
    seen = []

    def ask(x):
        seen.append(kernels_for(x))
        return x * 2

    with Watch():
        ask(x)
    torch.func.vmap(ask)(x)
    torch.func.grad(lambda x: ask(x).square().sum())(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated
        torch.jit.trace(ask, x, check_trace=False)
    assert seen == [None] * len(seen)
    assert len(seen) >= 4
    with torch.inference_mode():
        assert kernels_for(torch.ones(2, 3)) is not None


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("dtype", SUM_DTYPES)
@pytest.mark.parametrize("running_dtype", [*DTYPES, None], ids=str)
def test_running_statistics_move_as_those_of_the_reference(dtype, running_dtype, layout):
    generator = torch.Generator().manual_seed(4)
    packed = torch.rand(2 * 37 + 1, generator=generator, dtype=torch.float64) * 3
    packed[37:-1] += 10
    packed[-1], packed[3] = 8, math.nan
    packed[5], packed[37 + 5] = 8.0, 8.0 - 1e-12  # rounding must not make a variance negative
    running = [None, None]
    if running_dtype is not None:
        running = [torch.rand(37, generator=generator).to(running_dtype) for _ in range(2)]
    expected = [None if t is None else t.clone() for t in running]
    versions = [0 if t is None else t._version for t in running]
    x = draw((2, 37, 4), dtype, layout)
    found = kernels_for(x, None, None, *running).forward_apply(
        x, packed, None, None, Running(*running, momentum=0.3), 1e-5
    )
    wanted = reference.forward_apply(x, packed, None, None, Running(*expected, momentum=0.3), 1e-5)
    for one, other in zip((*found, *running), (*wanted, *expected), strict=True):
        if other is not None:
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, equal_nan=True)
    assert found[1].isnan().sum() == 2  # mean and invstd of channel 3
    assert all(t is None or t._version > before for t, before in zip(running, versions, strict=True))


@pytest.mark.parametrize("momentum", [0.0, 0.25, 1.0, torch.tensor(0.25), torch.tensor([0.25]).double(), None])
def test_momentum(momentum):
    """None is the average of all batches, this one included, which forward_reduce has counted."""
    x = draw((2, 3, 4), torch.float32)
    moved = []
    for has_cpp in (True, False):
        mean, var, num_batches = torch.zeros(3), torch.ones(3), torch.tensor(3)
        kernels = kernels_for(x, None, None, mean, var) if has_cpp else reference
        packed = kernels.forward_reduce(x, num_batches)
        assert num_batches == 4
        kernels.forward_apply(x, packed, None, None, Running(mean, var, num_batches, momentum), 1e-5)
        before = mean.clone(), var.clone()
        kernels.forward_apply(x, packed, None, None, Running(mean, var, None, None), 1e-5)  # without a count, none
        assert torch.equal(mean, before[0])
        assert torch.equal(var, before[1])
        moved.append((mean, var))
    factor = 0.25 if momentum is None else float(momentum)
    true = x.double().movedim(1, 0).flatten(1)
    wanted = factor * true.mean(1), 1 - factor + factor * true.var(1)
    for got in moved:
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lost", ["x", "weight", "bias"])
def test_a_tensor_that_is_not_in_memory(lost):
    """The functions that would read it do nothing, and say so."""
    x, dy = draw((2, 3, 4), torch.float32), draw((2, 3, 4), torch.float32, seed=2)
    summed, *parameters, sums = arguments(x)
    weight, bias = (t.clone() for t in parameters)  # memory of its own each
    kernels, statistics = kernels_for(x, weight, bias), statistics_of(summed, EPS)
    {"x": x, "weight": weight, "bias": bias}[lost].untyped_storage().resize_(0)
    calls = {
        "x": lambda: kernels.forward_reduce(x),
        "x weight bias": lambda: kernels.forward_apply(x, summed, weight, bias, Running(), EPS),
        "x dy": lambda: kernels.backward_reduce(dy, x, statistics, None, None),
        "x weight": lambda: kernels.backward_apply(dy, x, statistics, weight, sums),
    }
    for reads, call in calls.items():
        if lost in reads.split():
            with pytest.raises(RuntimeError, match="found one whose storage was freed"):
                call()
        else:
            call()


def of_cpu(y):
    """Whether the layer that computed y used the C++ kernels."""
    return isinstance(y.grad_fn.kernels, cpu.CpuKernels)


def train(rank, world_size, layout):
    with syncbn.use_kernels("cpu"):
        x = draw((6, 5, 7, 7), torch.float32, layout).chunk(world_size)[rank].requires_grad_()
        weight, bias = torch.linspace(-1, 2, 10).view(2, 5)
        running = torch.zeros(5), torch.ones(5)
        y = functional.sync_batch_norm(x, *running, weight, bias, training=True)
        assert of_cpu(y)
        (y * draw((6, 5, 7, 7), torch.float32, seed=2).chunk(world_size)[rank]).sum().backward()
        return y.detach(), x.grad, *running


@pytest.mark.parametrize("layout", ["first", "last"])
def test_a_layer_on_two_ranks(run, layout):
    results = run(train, 2, layout)
    layer = nn.BatchNorm2d(5, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 2, 10)[:5])
        layer.bias.copy_(torch.linspace(-1, 2, 10)[5:])
    x = draw((6, 5, 7, 7), torch.float32).double().requires_grad_()
    y = layer(x)
    (y * draw((6, 5, 7, 7), torch.float32, seed=2).double()).sum().backward()
    for i, wanted in enumerate((y.detach(), x.grad)):
        got = torch.cat([result[i] for result in results])
        torch.testing.assert_close(got.double(), wanted, rtol=2e-5, atol=2e-5)
    for result in results:
        for got, wanted in zip(result[2:], (layer.running_mean, layer.running_var), strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=2e-5, atol=2e-5)


def run_with(rank, world_size, cases, others):
    """Run the cases on C++ kernels, but on the reference on the ranks in ``others``."""
    found = []
    for case in cases:
        with syncbn.use_kernels("reference" if rank in others else "cpu"):
            backends.kernels_of.clear()
            result = run_case(rank, case)
            found.append((result, {isinstance(k, cpu.CpuKernels) for k in backends.kernels_of.values()}))
    return found


@pytest.mark.parametrize("others", [(1,), *(pytest.param(others, marks=pytest.mark.slow) for others in ((), (0, 2)))])
def test_ranks_with_any_kernels_equal_one_process(run, others):
    options = [{}, {"layer": {"affine": False}}, {"frozen_weight": True}, {"layer": {"momentum": None}}]
    cases = [
        (make_case([(n, 3, 4, 3) for n in split], steps=2, layout=layout, **more), split, layout)
        for split in ([2, 2, 2], [1, 4, 2], [0, 3, 0], [1, 0, 1])
        for layout in (None, "channels_last", "strided")
        for more in options
    ]
    results = run(run_with, 3, [case for case, *_ in cases], others)
    for i, (case, split, layout) in enumerate(cases):
        compare([result[i][0] for result in results], one_process(case), case, 1e-10)
        for rank, result in enumerate(results):
            assert result[i][1] == {rank not in others and split[rank] > 0 and layout != "strided"}


def train_apart(rank, world_size, dtype):
    """Even ranks use the C++ kernels; rank 1 has no values, rank 2 a single value per channel."""
    layer = syncbn.SyncBatchNorm(3, dtype=dtype)
    shape = {0: (2, 3, 5), 1: (0, 3, 5), 2: (1, 3, 1)}.get(rank, (rank, 3, 2))
    used = set()
    with syncbn.use_kernels("reference" if rank % 2 else "cpu"):
        for seed in range(40):
            torch.manual_seed(100 * seed + rank)
            x = (torch.randn(shape, dtype=dtype) + 3).requires_grad_()
            y = layer(x)
            used.add(of_cpu(y))
            y.square().sum().backward()
    return used, layer.running_mean, layer.running_var


@pytest.mark.parametrize("dtype", SUM_DTYPES, ids=str)
@pytest.mark.parametrize("world_size", [4, *(pytest.param(w, marks=pytest.mark.slow) for w in (5, 6))])
def test_ranks_with_any_kernels_have_the_same_running_statistics(run, world_size, dtype):
    used, *statistics = zip(*run(train_apart, world_size, dtype), strict=True)
    assert list(used) == [{rank % 2 == 0} for rank in range(world_size)]
    for of_ranks in statistics:
        for of_rank in of_ranks:
            assert torch.equal(of_rank, of_ranks[0])


def backward_passes(rank, world_size):
    """Compute gradients by the C++ kernels and by the reference, and observe some of the passes."""
    torch.manual_seed(rank)
    layer = syncbn.SyncBatchNorm(3, dtype=torch.float64)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    dys = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    results, operators = [], []
    for name in ("cpu", "reference"):
        with syncbn.use_kernels(name):
            y = layer(x)
            assert of_cpu(y) == (name == "cpu")
            part = torch.autograd.grad(y, layer.weight, dys[0], retain_graph=True)  # x is not asked for, and exchanged
            whole = torch.autograd.grad(y, [x, layer.bias], dys[0], retain_graph=True)
            again = torch.autograd.grad(y, x, dys[1], retain_graph=True)
            with Watch() as backward:
                observed = torch.autograd.grad(y, x, dys[1], retain_graph=True)
            left_out = torch.autograd.grad(torch.zeros(1, requires_grad=True).sum() + 0 * y[0, 0, 0], x)
            with Watch() as forward:
                y = layer(x)
            assert not of_cpu(y)  # kernels that were kept for such an input do not count here
            operators.append((forward.names, backward.names))
            results.append([*part, *whole, *again, *observed, *left_out, y.detach()])
    return results, operators


def test_observed_passes_show_all_operators_and_compute_the_same(run):
    for results, operators in run(backward_passes, 2):
        assert operators[0] == operators[1]
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
        (_, _, _, unobserved, observed, *_), _ = results
        torch.testing.assert_close(observed, unobserved, rtol=1e-12, atol=1e-12)


def in_place(rank, world_size):
    with syncbn.use_kernels("cpu"):
        layer, x = syncbn.SyncBatchNorm(3), torch.randn(2, 3, 4, requires_grad=True)
        versions = [buffer._version for buffer in layer.buffers()]
        y = layer(x * 1)
        assert of_cpu(y)
        assert all(buffer._version > version for buffer, version in zip(layer.buffers(), versions, strict=True))
        with torch.no_grad():
            layer.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.square().sum().backward()


def compiled_backward(rank, world_size):
    torch.manual_seed(rank)
    layer, x = syncbn.SyncBatchNorm(3), torch.randn(2, 3, 4, requires_grad=True)
    grads = []
    for context in (contextlib.nullcontext(), compiled_autograd._enable(torch.compile(backend="eager"))):
        with syncbn.use_kernels("cpu"):
            y = layer(x)
        assert of_cpu(y)
        layer.zero_grad()
        x.grad = None
        with context:
            y.backward(torch.arange(24.0).view(2, 3, 4))
        grads.append((x.grad, layer.weight.grad, layer.bias.grad))
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted)


def lost_weight(rank, world_size):
    with syncbn.use_kernels("cpu"):
        layer = syncbn.SyncBatchNorm(3)
        y = layer(torch.randn(2, 3, 4, requires_grad=True))
    assert of_cpu(y)
    layer.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"expected the weight .* found one whose storage was freed"):
        y.square().sum().backward()


def input_of_inference_mode(rank, world_size):
    """Autograd cannot save it; the exchange is not blamed for that."""
    with torch.inference_mode():
        x = torch.randn(2, 3, 4)
    with syncbn.use_kernels("cpu"), pytest.raises(RuntimeError, match="Inference tensors cannot") as caught:
        syncbn.SyncBatchNorm(3)(x)
    assert "exchange" not in str(caught.value)


def statistics_of_inference_mode(rank, world_size):
    """They have no version to be raised: the reference moves them, where torch lets it."""
    x = torch.randn(2, 3, 4)
    with syncbn.use_kernels("cpu"):
        backends.kernels_of.clear()
        plain = syncbn.SyncBatchNorm(3)
        with torch.inference_mode():
            made = syncbn.SyncBatchNorm(3)
            for layer in (plain, made):
                layer(x)
            assert [isinstance(k, cpu.CpuKernels) for k in backends.kernels_of.values()] == [True, False]
        for got, wanted in zip(made.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(got, wanted)
            assert got.is_inference()
            assert not wanted.is_inference()
        with torch.no_grad(), pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
            made(x)


def other_memory(rank, world_size, what):
    """Change how x or weight lies in memory between forward and backward; return the gradients of both kernels."""
    grads = []
    for name in ("cpu", "reference"):
        torch.manual_seed(rank)
        x = draw((2, 3, 4, 5), torch.float32, "last").requires_grad_()
        layer, hooks = syncbn.SyncBatchNorm(3), contextlib.nullcontext()
        if what == "strides of x":  # as hooks that keep tensors elsewhere may do
            hooks = torch.autograd.graph.saved_tensors_hooks(
                lambda t: t.detach().clone(memory_format=torch.contiguous_format), lambda t: t
            )
        with syncbn.use_kernels(name), hooks:
            y = layer(x)
        assert of_cpu(y) == (name == "cpu")
        if what == "dtype of weight":
            layer.double()
        y.backward(draw((2, 3, 4, 5), torch.float32, seed=2))
        grads.append(x.grad)
    return grads


@pytest.mark.parametrize("what", ["strides of x", "dtype of weight"])
def test_other_memory_in_backward(run, what):
    for got, wanted in run(other_memory, 2, what):
        torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)


def another_shape(rank, world_size):
    """Autograd refuses such a gradient before the kernels could read beyond its end."""
    with syncbn.use_kernels("cpu"):
        y = syncbn.SyncBatchNorm(3)(torch.randn(2, 3, 4, requires_grad=True))
    with pytest.raises(RuntimeError, match="Mismatch in shape"):
        y.backward(torch.ones(1, 3, 4))


@pytest.mark.parametrize(
    "function",
    [
        in_place,
        compiled_backward,
        lost_weight,
        input_of_inference_mode,
        statistics_of_inference_mode,
        another_shape,
    ],
)
def test_special_cases_of_a_layer(run, function):
    run(function, 2)


@contextlib.contextmanager
def undecided(patch):
    """Forget the library that is loaded, for a while."""
    with patch.context() as inner:
        inner.setattr(cpu, "_library", None)
        inner.setattr(cpu, "_is_decided", False)
        inner.setattr(cpu, "_problem", "")
        yield inner


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["forward_reduce", "forward_apply", "backward_reduce", "backward_apply"])
def test_wrong_results_are_found(monkeypatch, phase):
    x, right = torch.ones(2, 3), getattr(cpu.CpuKernels, phase)

    def wrong(*args):
        result = right(*args)
        (result[0] if isinstance(result, tuple) else result).add_(1)
        return result

    with undecided(monkeypatch) as inner:
        inner.setattr(cpu.CpuKernels, phase, wrong)
        with pytest.warns(RuntimeWarning, match=f"in {phase}"):
            assert kernels_for(x) is None
        assert kernels_for(x) is None  # and says so once
    assert kernels_for(x) is not None
    assert selfcheck.passes("the C++ kernels", cpu.kernels_for, torch.device("cpu"))


@pytest.mark.parametrize(
    "options", ["-U__AVX512F__", "-U__AVX512F__ -U__AVX__ -U__F16C__"], ids=["32 bytes", "16 bytes"]
)
@pytest.mark.slow
def test_other_registers(monkeypatch, options):
    """As on a processor that has narrower ones, and converts no halves."""
    monkeypatch.setenv("CXX", f"c++ {options}")
    with undecided(monkeypatch):
        for dtype in DTYPES:
            for layout in ("first", "last"):
                test_every_shape(dtype, layout)
        for layout in ("first", "last"):
            test_every_half_number(torch.float16, layout)
            test_every_half_number(torch.bfloat16, layout)


FALL_BACK = """
import warnings, torch, syncbn
from syncbn.ops import backends, reference
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    chosen = [backends.choose(torch.ones(2, 3, 4, 4), *[None] * 4) is reference for _ in range(3)]
print(chosen, *[w.message for w in caught if w.category is RuntimeWarning], sep="\\n")
"""


def test_without_a_compiler_one_warning(tmp_path):
    env = os.environ | {"SYNCBN_KERNELS": "cpu", "CXX": "false", "XDG_CACHE_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", FALL_BACK], env=env, capture_output=True, text=True, check=True)
    chosen, *messages = result.stdout.splitlines()
    assert chosen == "[True, True, True]"
    assert len(messages) == 1
    assert messages[0].startswith("SYNCBN_KERNELS=cpu:")
    assert "`false --version` to succeed, got exit code 1" in messages[0]
    assert "SYNCBN_KERNELS=auto" in messages[0]
    assert not list(tmp_path.rglob("*.so"))


def test_a_compiler_that_does_not_exist(monkeypatch):
    """Without a word where it is not asked for; and then one warning, where it is."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    arguments = torch.ones(2, 3), None, None, None, None
    with undecided(monkeypatch):
        with syncbn.use_kernels("auto"):
            assert backends.choose(*arguments) is reference
        with syncbn.use_kernels("cpu"):
            with pytest.warns(RuntimeWarning, match="FileNotFoundError.*no-such-compiler"):
                assert backends.choose(*arguments) is reference
            assert backends.choose(*arguments) is reference


def test_nothing_is_built_that_would_not_be_used(monkeypatch):
    load = mock.Mock(side_effect=RuntimeError("built"))
    arguments = torch.ones(2, 3), None, None, None, None
    with undecided(monkeypatch) as inner:
        inner.setattr(build, "load", load)
        with syncbn.use_kernels("reference"):
            assert backends.choose(*arguments) is reference
        with syncbn.use_kernels("cpu"), Watch():
            assert backends.choose(*arguments) is reference
        assert not load.called
        with syncbn.use_kernels("cpu"), pytest.warns(RuntimeWarning, match="got RuntimeError: built"):
            assert backends.choose(*arguments) is reference


INFERENCE_FIRST = """
import torch, torch.distributed as dist, syncbn
from syncbn.ops import backends, cpu
from torch.testing._internal.distributed.fake_pg import FakeStore
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
with torch.inference_mode():
    syncbn.SyncBatchNorm(3)(torch.randn(2, 3, 4))
assert cpu.is_ready()
syncbn.SyncBatchNorm(3)(torch.randn(2, 3, 4))
print([type(k).__name__ for k in backends.kernels_of.values()][-1])
"""


@pytest.mark.slow
def test_the_first_step_of_a_process_may_be_in_inference_mode():
    result = subprocess.run([sys.executable, "-c", INFERENCE_FIRST], capture_output=True, text=True, timeout=100)
    assert result.stdout.strip() == "CpuKernels", result.stderr


def lost_view(rank, world_size):
    """As FSDP's flat parameters: the weight is a view into a storage that is freed."""
    layer, flat = syncbn.SyncBatchNorm(3), torch.ones(9)
    layer.weight = nn.Parameter(flat[3:6])
    with syncbn.use_kernels("cpu"):
        y = layer(torch.randn(2, 3, 4, requires_grad=True))
    flat.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="storage was freed"):
        y.square().sum().backward()


def test_a_weight_in_a_storage_that_was_freed(run):
    run(lost_view, 2)
