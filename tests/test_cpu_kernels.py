"""kernels/fused.py against formulas in float64: dtypes, layouts, odd sizes, hard numbers, threads, fall-backs."""

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
from syncbn.kernels import fused, reference, selfcheck
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import syncbn
from syncbn import functional, kernels, moments, step
from syncbn.ops.reference import per_channel, sum_dtype

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
        assert fused.supports(torch.ones(2, 3))
        yield folder


def lay_out(x, layout):
    """Return x contiguous, or with its channels last in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "last" else x.contiguous()


def draw(shape, dtype=torch.float64, layout="first", mean=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 1.5 + mean
    return lay_out(x.to(dtype), layout)


def dims(x):
    return [0, *range(2, x.dim())]


def statistics(x, eps=1e-5):
    var, mean = torch.var_mean(x.double(), dims(x), correction=0)
    return mean, (var + eps).rsqrt()


def truth(x, dy, mean, invstd, weight, bias, sums, count):
    """Compute the four primitives by their formulas, in float64."""
    x, dy = x.double(), dy.double()
    mean, invstd, weight, bias = (per_channel(t.double(), x) for t in (mean, invstd, weight, bias))
    xhat = (x - mean) * invstd
    mean_dy, mean_dy_xhat = (per_channel(t, x) for t in (sums / count).chunk(2))
    num = x.numel() // x.shape[1]
    return {
        "local_sums": torch.cat([x.sum(dims(x)), x.square().sum(dims(x)), torch.tensor([num]).double()]),
        "normalize": xhat * weight + bias,
        "backward_sums": torch.cat([dy.sum(dims(x)), (dy * xhat).sum(dims(x))]),
        "input_gradient": weight * invstd * (dy - mean_dy - xhat * mean_dy_xhat),
    }


def ours(x, dy, mean, invstd, weight, bias, sums, count):
    return {
        "local_sums": fused.local_sums(x),
        "normalize": fused.normalize(x, mean, invstd, weight, bias),
        "backward_sums": torch.cat(fused.backward_sums(dy, x, mean, invstd)),
        "input_gradient": fused.input_gradient(dy, x, mean, invstd, weight, sums, count),
    }


def arguments(x, seed=1):
    """Draw everything but x and dy; sums are those of some more ranks."""
    num_features = x.shape[1]
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(2, num_features, generator=generator)
    mean, invstd = (t.to(sum_dtype(x)) for t in statistics(x, eps=0.1))  # one value has no variance
    sums = torch.randn(2 * num_features, generator=generator, dtype=torch.float64)
    return mean, invstd, weight, bias, sums, torch.tensor(3.0).double() * x.numel() / num_features


def check(x, dy, *rest):
    results = ours(x, dy, *rest)
    for name, true in truth(x, dy, *rest).items():
        got = results[name]
        if got.dim() == 1:
            assert got.dtype == torch.float64
            scale = 1 if name == "backward_sums" else 1e-3  # sums of x are those of products without a rounding
            rtol = atol = scale * TOLERANCE[sum_dtype(x)][0]
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
        assert fused.supports(x)
        check(x, dy, *arguments(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["first", "last"])
def test_every_half_number(dtype, layout):
    """All 65536 are read and written exactly; a product with one rounding is that of torch."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(2, 8, 64, 64)
    x = lay_out(x, layout)
    zero, one = torch.zeros(8), torch.ones(8)
    assert torch.equal(fused.normalize(x, zero, one, None, None).nan_to_num(7), x.nan_to_num(7))
    for scale in (1 / 3, 0.77, 1.5, 1000.3, 1e-4):
        y, wanted = fused.normalize(x, zero, one * scale, None, None), (x.float() * scale).to(dtype)
        assert torch.equal(y.nan_to_num(7), wanted.nan_to_num(7))
        assert torch.equal(y.isnan(), wanted.isnan())


@pytest.mark.parametrize("dtype", [None, *DTYPES], ids=str)
def test_dtypes_of_weight_and_bias(dtype):
    for of_x in DTYPES:
        x, dy = draw((4, 19, 5, 5), of_x), draw((4, 19, 5, 5), of_x, seed=2)
        mean, invstd, weight, bias, *sums = arguments(x)
        if dtype is None:
            mine, theirs = (None, None), (torch.ones(19), torch.zeros(19))
        else:
            mine = theirs = weight.to(dtype), bias.to(dtype)
        true = truth(x, dy, mean, invstd, *theirs, *sums)
        got = ours(x, dy, mean.double(), invstd.double(), *mine, *sums)  # which may be float64, too
        for name in ("normalize", "input_gradient"):
            rtol, atol = TOLERANCE[of_x]
            torch.testing.assert_close(got[name].double(), true[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("dtype", SUM_DTYPES, ids=str)
@pytest.mark.parametrize("ratio", [100, 1e4])
def test_means_far_from_zero(dtype, layout, ratio):
    """Channel 0 is constant. The rounding of float64 is all that the variance may lose."""
    x, dy = draw((8, 5, 40, 40), dtype, layout, mean=1.5 * ratio), draw((8, 5, 40, 40), dtype, layout, seed=2)
    x[:, 0] = 1.5 * ratio
    batch = moments.unpack(fused.local_sums(x), 1e-5)
    mean, invstd = statistics(x)
    torch.testing.assert_close(batch.mean, mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(batch.sqdev / batch.count, invstd**-2 - 1e-5, rtol=2e-15 * ratio**2, atol=1e-7)
    *_, weight, bias, sums, count = arguments(x)
    rest = batch.mean.to(dtype), batch.invstd.to(dtype), weight, bias, sums, count
    got, true = ours(x, dy, *rest), truth(x, dy, *rest)
    unit = 2e-5 if dtype is torch.float32 else 1e-10
    far = 3e-7 if dtype is torch.float32 else 1e-14
    for name, slope in (("normalize", invstd * weight), ("input_gradient", weight * invstd**2)):
        # times the value's own size, and mean / std of its channel (which is huge where std is 0)
        bound = unit * (1 + true[name].abs()) + far * per_channel((mean * slope).abs(), x)
        assert ((got[name] - true[name]).abs() <= bound).all(), name
    assert (got["backward_sums"] - true["backward_sums"]).abs().max() <= 1e-12 * ratio * dy.numel() / 5 * 1e3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layout", ["first", "last"])
def test_what_is_not_finite_stays_in_its_channel(bad, layout):
    for shape, place in (((3, 5, 7, 7), (0, 2, 0, 0)), ((3, 5, 7, 7), (2, 2, 6, 6)), ((4, 5, 2, 2), (3, 2, 1, 1))):
        x = draw(shape, torch.float32, layout)
        dy = draw(shape, torch.float32, layout, seed=2)
        x[place] = bad
        finite = torch.arange(5) != 2
        batch, known = (moments.unpack(k.local_sums(x), 1e-5) for k in (fused, reference))
        assert torch.equal(batch.invstd.isfinite(), finite)
        assert torch.equal(known.invstd.isfinite(), finite)
        args = [t.float() for t in (batch.mean, batch.invstd)]
        y = fused.normalize(x, *args, None, None)
        assert torch.equal(y.isnan(), reference.normalize(x, *args, None, None).isnan())
        zero, one = torch.zeros(5), torch.ones(5)
        y, wanted = (k.normalize(x, zero, one, one, zero) for k in (fused, reference))
        assert torch.equal(y.nan_to_num(9, 8, 7), wanted.nan_to_num(9, 8, 7))
        for mine, theirs in ((x, dy), (dy, x)):
            sums = torch.cat(fused.backward_sums(mine, theirs, zero, one)).view(2, 5).isfinite()
            wanted = torch.cat(reference.backward_sums(mine, theirs, zero, one)).view(2, 5).isfinite()
            assert torch.equal(sums, wanted)


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
    mean, invstd, weight, _, sums, count = arguments(x)
    plain = torch.zeros_like(x).add(dy)
    for mine, wanted in zip(
        (*fused.backward_sums(dy, x, mean, invstd), fused.input_gradient(dy, x, mean, invstd, weight, sums, count)),
        (
            *fused.backward_sums(plain, x, mean, invstd),
            fused.input_gradient(plain, x, mean, invstd, weight, sums, count),
        ),
        strict=True,
    ):
        assert torch.equal(mine, wanted)


@pytest.fixture
def three_threads(same_num_threads):
    torch.set_num_threads(3)


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("shape", [(5, 7, 199, 151), (1, 3, 600, 601), (70001, 13), (3, 30011, 3, 4)], ids=str)
def test_threads(shape, layout, three_threads):
    """Their number changes the order of additions alone, and nothing else does."""
    x, dy = draw(shape, torch.float32, layout), draw(shape, torch.float32, layout, seed=2)
    rest = arguments(x)
    many, again = ours(x, dy, *rest), ours(x, dy, *rest)
    torch.set_num_threads(1)
    one = ours(x, dy, *rest)
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
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
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
    assert not fused.supports(x)


def test_who_follows_operators_sees_them():
    x = torch.randn(4, 3, 5)
    assert fused.supports(x)
    assert fused.supports(nn.Parameter(x))
    seen = []

    def ask(x):
        seen.append(fused.supports(x))
        return x * 2

    with Watch():
        ask(x)
    torch.func.vmap(ask)(x)
    torch.func.grad(lambda x: ask(x).square().sum())(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated
        torch.jit.trace(ask, x, check_trace=False)
    assert seen == [False] * len(seen)
    assert len(seen) >= 4
    with torch.inference_mode():
        assert fused.supports(torch.ones(2, 3))


def test_per_channel_tensors_that_do_not_fit():
    """They are never read beyond their end: the reference takes them, or says what is wrong."""
    x, dy = draw((3, 4, 5), torch.float32), draw((3, 4, 5), torch.float32, seed=2)
    mean, invstd, weight, bias, sums, count = arguments(x)
    strided = torch.stack([weight, weight], 1)[:, 0]
    wanted = fused.normalize(x, mean, invstd, weight, bias)
    torch.testing.assert_close(fused.normalize(x, mean, invstd, strided, bias), wanted)
    for short in (weight[:3], weight[:0]):
        with pytest.raises(RuntimeError):
            fused.normalize(x, mean, invstd, short, bias)
        with pytest.raises(RuntimeError):
            fused.normalize(x, mean, invstd, weight, short)
        with pytest.raises(RuntimeError):
            fused.backward_sums(dy, x, short, invstd)
        with pytest.raises(RuntimeError):
            fused.input_gradient(dy, x, mean, invstd, short, sums, count)
    with pytest.raises(RuntimeError):
        fused.backward_sums(dy[:2], x, mean, invstd)


def train(rank, world_size, folder, layout):
    cache = mock.patch.dict(os.environ, XDG_CACHE_HOME=folder)
    with cache, syncbn.use_kernels("fused"), mock.patch.object(step, "train", return_value=None):
        x = draw((6, 5, 7, 7), torch.float32, layout).chunk(world_size)[rank].requires_grad_()
        assert kernels.choose(x) is fused
        weight, bias = torch.linspace(-1, 2, 10).view(2, 5)
        running = torch.zeros(5), torch.ones(5)
        y = functional.sync_batch_norm(x, *running, weight, bias, training=True)
        (y * draw((6, 5, 7, 7), torch.float32, seed=2).chunk(world_size)[rank]).sum().backward()
        return y.detach(), x.grad, *running


@pytest.mark.parametrize("layout", ["first", "last"])
def test_a_layer_on_two_ranks(run, cache, layout):
    results = run(train, 2, str(cache), layout)
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


@contextlib.contextmanager
def undecided(patch):
    """Forget the library that is loaded, for a while."""
    with patch.context() as inner:
        inner.setattr(fused, "_library", None)
        inner.setattr(fused, "_is_decided", False)
        yield inner


def test_wrong_results_are_found(monkeypatch):
    x = torch.ones(2, 3)
    with undecided(monkeypatch) as inner:
        inner.setattr(fused, "normalize", lambda x, *_: x + 1)
        with pytest.warns(RuntimeWarning, match="in normalize"):
            assert not fused.supports(x)
        assert not fused.supports(x)  # and says so once
    assert fused.supports(x)
    assert selfcheck.passes(fused, torch.device("cpu"))


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
from syncbn import kernels
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    chosen = [kernels.choose(torch.ones(2, 3, 4, 4)).__name__.split(".")[-1] for _ in range(3)]
print(chosen, *[w.message for w in caught if w.category is RuntimeWarning], sep="\\n")
"""


def test_without_a_compiler_one_warning(tmp_path):
    env = os.environ | {"SYNCBN_KERNELS": "fused", "CXX": "false", "XDG_CACHE_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", FALL_BACK], env=env, capture_output=True, text=True, check=True)
    chosen, *messages = result.stdout.splitlines()
    assert "fused" not in chosen
    assert len(messages) == 1
    assert "`false --version` to succeed, got exit code 1" in messages[0]
    assert "SYNCBN_KERNELS=auto" in messages[0]
    assert not list(tmp_path.rglob("*.so"))


def test_a_compiler_that_does_not_exist(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with undecided(monkeypatch), pytest.warns(RuntimeWarning, match="FileNotFoundError.*no-such-compiler"):
        assert not fused.supports(torch.ones(2, 3))


@pytest.mark.parametrize("running_dtype", [torch.float32, torch.float64, None])
@pytest.mark.parametrize("dtype", SUM_DTYPES)
def test_advance_moves_statistics_as_moments_does(dtype, running_dtype):
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
    found = fused.advance(packed, 1e-5, dtype, *running, 0.3, False)
    wanted = moments.advance(packed, 1e-5, dtype, *expected, 0.3, False)
    for one, other in zip((*found, *running), (*wanted, *expected), strict=True):
        if other is not None:
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, equal_nan=True)
    assert found[1].isnan().sum() == 1
    assert all(t is None or t._version > before for t, before in zip(running, versions, strict=True))


def test_advance_leaves_to_moments_what_is_not_usual():
    packed, mean, var = torch.ones(7, dtype=torch.float64), torch.zeros(3), torch.ones(3)
    arguments = (packed, 1e-5, torch.float32)
    assert fused.advance(*arguments, mean, var, torch.tensor(0.1), False) is None
    assert fused.advance(*arguments, mean, var, 0.1, True) is None
    assert fused.advance(*arguments, mean.half(), var.half(), 0.1, False) is None
    assert fused.advance(*arguments, torch.zeros(6)[::2], var, 0.1, False) is None


def test_advance_takes_statistics_made_in_inference_mode():
    with torch.inference_mode():
        mean, var = torch.zeros(3), torch.ones(3)
        assert fused.advance(torch.ones(7, dtype=torch.float64) * 4, 1e-5, torch.float32, mean, var, 0.5, False)
    torch.testing.assert_close(mean, torch.full((3,), 0.5))
