"""ops/triton in Triton's interpreter, on CPU tensors: what the kernels compute, and what is launched.

The interpreter runs programs one after the other. What it cannot show is the order of memory accesses on a GPU, and
that the kernels compile: for that see test_triton_launch.py and the GPU check.
"""

import math
import warnings
from dataclasses import replace

import hypothesis
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from oracle import compare, make_case, truth
from test_batchnorm import RTOL, run_cases
from test_cuda_kernels import SYNCS, TOLERANCE, error, laid_out, sum_dtype, traced, traces_on_a_rank, whole
from test_properties import COMMON, SEED, programs
from test_properties import check as check_programs
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import syncbn
from syncbn.ops import backends, reference, selfcheck
from syncbn.ops import triton as triton_ops
from syncbn.ops.autograd import alike
from syncbn.ops.reference import Running
from syncbn.ops.triton import kernels, launch
from syncbn.ops.triton.tiles import choose_splits, choose_tile

SHAPES = [
    ((9, 5), None),
    ((4, 5, 7), None),
    ((4, 5, 6, 3), torch.channels_last),
    ((3, 5, 2, 3, 4), torch.channels_last_3d),
    ((2, 8, 16, 16), None),
    ((2, 16, 5, 5), torch.channels_last),
]
MORE_SHAPES = [
    ((4, 5, 6, 3), None),
    ((3, 1, 24, 24), None),
    ((1030, 3), None),
    ((3, 70, 4, 4), torch.channels_last),
    ((40, 3, 7, 7), None),
    ((2, 33, 7, 7), None),
    ((3, 2, 33, 33), None),
    ((2, 2, 64, 64), None),
    ((3, 5, 2, 3, 4), None),
    ((9, 5, 1, 1), None),
    ((3, 2, 1100), None),
    ((7, 130), None),
]


def kernels_for(x, *per_channel):
    """Return Triton's kernels for ``x``; four programs share a channel wherever there are so many tiles."""
    per_channel = per_channel or [None] * 4
    found = triton_ops.kernels_for(x, *per_channel, quietly=False)
    assert isinstance(found, launch.TritonKernels)
    view = found.sizes
    num_tiles = math.ceil(view[0] / found.constants[0]) * math.ceil(x.numel() / max(x.shape[1] * view[0], 1))
    found.splits = (min(4, num_tiles), min(5, num_tiles)) if num_tiles > 1 else found.splits
    return found


def two_parts(x, dy, weight, bias, eps=1e-5):
    """Run the phases on two uneven parts of a batch; return y, dx, sum_dy, sum_dy_xhat of all of it."""
    parts = list(zip(x.split([1, len(x) - 1]), dy.split([1, len(x) - 1]), strict=True))
    parts = [(x, alike(dy, x)) for x, dy in parts]
    each = [kernels_for(x, weight, bias, None, None) for x, _ in parts]
    summed = sum(k.forward_reduce(x) for k, (x, _) in zip(each, parts, strict=True))
    found = [k.forward_apply(x, summed, weight, bias, Running(), eps) for k, (x, _) in zip(each, parts, strict=True)]
    y, statistics = zip(*found, strict=True)
    torch.testing.assert_close(*statistics, rtol=0, atol=0, equal_nan=True)
    dtypes = [None if p is None else p.dtype for p in (weight, bias)]
    reduced = [k.backward_reduce(dy, x, statistics[0], *dtypes) for k, (x, dy) in zip(each, parts, strict=True)]
    for packed, grad_weight, grad_bias in reduced:
        for dtype, got, wanted in zip(dtypes, (grad_weight, grad_bias), packed.chunk(2)[::-1], strict=True):
            assert got is None if dtype is None else torch.allclose(got.double(), wanted.to(dtype).double(), rtol=1e-2)
    sums = sum(packed for packed, *_ in reduced)
    assert summed.dtype == statistics[0].dtype == sums.dtype == torch.float64
    dx = [k.backward_apply(dy, x, statistics[0], weight, sums) for k, (x, dy) in zip(each, parts, strict=True)]
    for x, *results in zip((x for x, _ in parts), y, dx, strict=True):
        assert all(r.dtype == x.dtype and r.stride() == x.stride() for r in results)
    return torch.cat(y), torch.cat(dx), *sums.chunk(2)


def match_float64(shape, layout, dtype):
    torch.manual_seed(0)
    channels = shape[1]
    x, dy = laid_out(torch.randn(shape, dtype=dtype) * 2 + 3, layout), torch.randn(shape).to(dtype)
    for kind in [(None, None), (sum_dtype(x), sum_dtype(x)), (sum_dtype(x), None), (dtype, dtype)]:
        weight, bias = (None if k is None else (torch.rand(channels) + 0.5).to(k) for k in kind)
        for got, true in zip(two_parts(x, dy, weight, bias), whole(x, dy, weight, bias), strict=True):
            assert error(got, true) < TOLERANCE[dtype], kind


SOME = [(*kind, [*TOLERANCE][i % len(TOLERANCE)]) for i, kind in enumerate(SHAPES)]
MORE = [(*kind, dtype) for kind in [*SHAPES, *MORE_SHAPES] for dtype in TOLERANCE if (*kind, dtype) not in SOME]


LONG = (1, 3, 4)  # of SOME: seconds in the interpreter
PHASES = [pytest.param(*case, marks=[pytest.mark.slow] * (i in LONG)) for i, case in enumerate(SOME)]


@pytest.mark.parametrize(("shape", "layout", "dtype"), PHASES)
def test_the_phases_match_float64(shape, layout, dtype):
    match_float64(shape, layout, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "layout", "dtype"), MORE)
def test_the_phases_match_float64_on_more_shapes(shape, layout, dtype):
    match_float64(shape, layout, dtype)


@pytest.mark.parametrize("ratio", [pytest.param(1e2, marks=pytest.mark.slow), 1e4])
@pytest.mark.parametrize("layout", [None, torch.channels_last])
def test_means_far_from_zero(layout, ratio):
    """Output within 3e-7 * mean / std, variance within 1e-4 (design.md); here it does not depend on the mean."""
    torch.manual_seed(0)
    x, dy = laid_out(torch.randn(3, 8, 20, 20) * 0.1 + 0.1 * ratio, layout), torch.randn(3, 8, 20, 20)
    packed = kernels_for(x).forward_reduce(x)
    mean, sqdev = reference.moments(packed)
    true = x.double().transpose(0, 1).flatten(1)
    assert ((sqdev / packed[-1]) / true.var(1, correction=0) - 1).abs().max() < 1e-5
    assert (mean / true.mean(1) - 1).abs().max() < 1e-9
    y, dx, *_ = zip(two_parts(x, dy, None, None), whole(x, dy, None, None), strict=True)
    assert (y[0] - y[1]).abs().max() < 2e-6
    assert error(*dx) < 2e-6


def test_the_variance_far_below_eps_and_of_a_constant_channel():
    x = torch.randn(8, 4, 9, 9)
    x[:, 0] *= 1e-5
    x[:, 1] = 1 / 3
    _, sqdev = reference.moments(kernels_for(x).forward_reduce(x))
    true = x.double().transpose(0, 1).flatten(1).var(1, correction=0) * 648
    assert (sqdev / true - 1)[[0, 2, 3]].abs().max() < 1e-4
    assert abs(sqdev[1]) < 1e-12


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, under the interpreter
def test_what_is_not_finite_stays_in_its_channel():
    x, dy = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    x[0, 0, 0, 0], x[1, 1, 0, 0] = math.nan, math.inf
    y, dx, _, sum_dy_xhat = two_parts(x, dy, None, None)
    for channel, is_finite in enumerate([False, False, True]):
        assert y[:, channel].isfinite().all() == is_finite
        assert dx[:, channel].isfinite().all() == is_finite
        assert sum_dy_xhat[channel].isfinite() == is_finite
    buffers = [torch.zeros(3), torch.ones(3), torch.zeros(3), torch.ones(3)]
    found = kernels_for(x, None, None, *buffers[:2])
    packed = found.forward_reduce(x)
    statistics = [
        phases.forward_apply(x, packed, None, None, Running(*two, None, 0.1), 1e-5)[1]
        for phases, two in ((found, buffers[:2]), (reference, buffers[2:]))
    ]
    torch.testing.assert_close(*statistics, rtol=1e-12, atol=0, equal_nan=True)
    torch.testing.assert_close(buffers[:2], buffers[2:], equal_nan=True)


@pytest.mark.parametrize("layout", [pytest.param(None, marks=pytest.mark.slow), torch.channels_last])
def test_any_number_of_programs_adds_up_to_the_same(layout):
    """And leaves the counters at 0, in memory that all launches of a stream share."""
    x, dy = laid_out(torch.randn(5, 6, 30, 30), layout), torch.randn(5, 6, 30, 30)
    statistics = torch.cat([torch.randn(6), torch.rand(6) + 0.5, torch.tensor([4500.0])]).double()
    found = kernels_for(x)
    results = []
    for splits in (1, 2, 3, 7):
        found.splits, found.ready = (splits, splits), {}
        for _ in range(2):
            results.append((found.forward_reduce(x), *found.backward_reduce(dy, x, statistics, None, torch.float32)))
    for packed, sums, _, grad_bias in results[1:]:
        torch.testing.assert_close(packed, results[0][0], rtol=1e-6, atol=1e-3)  # sums of 4500 values
        torch.testing.assert_close(sums, results[0][1], rtol=1e-6, atol=1e-3)
        assert torch.equal(grad_bias, sums[:6].float())
    for first, second in zip(results[::2], results[1::2], strict=True):
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
    assert all((counters == 0).all() for _, counters in launch._workspaces.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "momentum", [0.1, 0.0, 1.0, None, torch.tensor(0.3), torch.tensor(0.3).double(), torch.tensor([0.25]).half()]
)
def test_momentum(momentum, dtype):
    x = torch.randn(4, 3, 5, 5, dtype=dtype)
    buffers = torch.rand(2, 3, dtype=dtype) + 0.5
    results = []
    for phases in (kernels_for(x, None, None, *buffers), reference):
        (mean, var), counted = buffers.clone(), torch.tensor(6)
        versions = mean._version, var._version
        for _ in range(2):
            packed = phases.forward_reduce(x, counted)
            phases.forward_apply(x, packed, None, None, Running(mean, var, counted, momentum), 1e-5)
        assert (mean._version, var._version) != versions  # autograd sees it
        assert counted == 8
        results.append((mean, var))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(*results, rtol=tolerance, atol=0)


def test_eps_and_momentum_are_not_rounded_to_float32():
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64) * 1e-2
    mean, var = torch.zeros(2, 3, dtype=torch.float64)
    found = kernels_for(x, None, None, mean, var)
    y, _ = found.forward_apply(x, found.forward_reduce(x), None, None, Running(mean, var, None, 0.1), 1e-3)
    torch.testing.assert_close(y, nn.functional.batch_norm(x, None, None, training=True, eps=1e-3), rtol=1e-12, atol=0)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)) * 0.1, rtol=1e-12, atol=0)
    assert sum(launch.halves(0.1)) == pytest.approx(0.1, rel=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 5, 4, 4), (0, 1, 4), (3, 5, 0, 4), (0, 5)])
def test_an_empty_part(shape, dtype):
    """It adds nothing, but its running statistics move as those of others do; where all are empty nothing moves."""
    x, weight = torch.randn(shape).to(dtype), torch.rand(shape[1])
    mean, var, counted = torch.zeros(shape[1]), torch.ones(shape[1]), torch.tensor(0)
    found = kernels_for(x, weight, weight, mean, var)
    packed = found.forward_reduce(x, counted)
    assert torch.equal(packed, torch.zeros_like(packed))
    y, statistics = found.forward_apply(x, packed, weight, weight, Running(mean, var, counted, 0.1), 1e-5)
    assert y.shape == x.shape
    assert torch.equal(statistics[: shape[1]], torch.zeros(shape[1]).double())
    assert mean.eq(0).all()
    assert var.eq(1).all()
    others = torch.cat([torch.full((shape[1],), 8.0), torch.full((shape[1],), 40.0), torch.tensor([4.0])]).double()
    _, statistics = found.forward_apply(x, others, weight, weight, Running(mean, var, counted, 0.1), 1e-5)
    torch.testing.assert_close(mean, torch.full_like(mean, 0.2))  # of 2
    torch.testing.assert_close(var, torch.full_like(var, 0.9 + 0.1 * 24 / 3))
    sums, grad_weight, _ = found.backward_reduce(x, x, statistics, weight.dtype, None)
    assert torch.equal(sums, torch.zeros_like(sums))
    assert grad_weight.eq(0).all()
    assert found.backward_apply(x, x, statistics, weight, sums).shape == x.shape


def test_dy_of_any_strides_and_dtype():
    x = torch.randn(4, 5, 6, 3).contiguous(memory_format=torch.channels_last)
    dys = torch.randn(4, 5, 1, 1).expand(4, 5, 6, 3), torch.randn(4, 3, 6, 5).transpose(1, 3), torch.randn(4, 5, 6, 3)
    for dy in (*dys, dys[2].double(), torch._neg_view(dys[2])):
        for got, true in zip(two_parts(x, dy, None, None), whole(x, dy, None, None), strict=True):
            assert error(got, true) < TOLERANCE[torch.float32]


def test_memory_that_begins_anywhere():
    x, dy = torch.randn(2, 4 * 5 * 6 * 3 + 1)[:, 1:].reshape(2, 4, 5, 6, 3)
    odd, dodd = (torch.empty(t.numel() + 1)[1:].view(t.shape).copy_(t) for t in (x, dy))
    assert odd.data_ptr() % 16
    for got, wanted in zip(two_parts(odd, dodd, None, None), two_parts(x, dy, None, None), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_offsets_beyond_31_bits():
    """Of the last tile of a tensor that is not there: one of many rows, one of long ones, one of many channels."""

    @triton.jit
    def last(out, where, tile, outer, channels, inner, rows: tl.constexpr, width: tl.constexpr):
        offsets, mask, count = kernels.locate(tile, tl.arange(0, 4), outer, channels, inner, rows, width)
        tl.store(out, tl.max(tl.max(tl.max(tl.where(mask, offsets, -1), 2), 1), 0))
        tl.store(where, count)

    @triton.jit
    def count(out, outer, channels, inner, rows: tl.constexpr, width: tl.constexpr):
        _, _, num_tiles, _, _ = kernels.begin(outer, channels, inner, rows, 4, width, 1)
        tl.store(out, num_tiles)

    for outer, channels, inner, rows, width in (
        (2**31 + 5, 4, 1, 8, 1),
        (2**31 - 5, 4, 1, 8, 1),
        (3, 4, 2**31 + 5, 2, 16),
        (1, 4, 2**31 - 8, 2, 1024),
        (2**20, 4, 2**12 + 3, 4, 256),
    ):
        out, where = torch.zeros(2, dtype=torch.int64)
        num_tiles = -(-outer // rows) * -(-inner // width)
        count[(1,)](out, outer, channels, inner, rows, width)
        assert out == num_tiles
        last[(1,)](out, where, num_tiles - 1, outer, channels, inner, rows, width)
        assert out == outer * channels * inner - 1
        assert where == ((outer - 1) % rows + 1) * ((inner - 1) % width + 1)


def test_tiles_and_programs_cover_everything_once():
    for dtype in TOLERANCE:
        for outer in (0, 1, 2, 31, 4096):
            for channels in (1, 3, 64, 2048):
                for inner in (1, 4, 49, 196, 784, 3136, 12544):
                    tile = choose_tile(outer, channels, inner, dtype)
                    assert tile.rows * tile.block * tile.width <= 2048
                    assert (channels if inner == 1 else inner) % tile.vector == 0
                    assert 16 % (tile.vector * dtype.itemsize) == 0
                    num_tiles = -(-outer // tile.rows) * -(-inner // tile.width)
                    for splits in choose_splits(tile, outer, channels, inner, 132):
                        assert 1 <= splits <= max(num_tiles, 1)
    assert choose_tile(1, 1, 2**31, torch.half).vector == 1  # the kernels multiply what they get by it, in 32 bits
    tiles = {choose_tile(32, c, 1, torch.bfloat16) for c in (64, 128, 256, 512, 1024, 2048)}
    assert len(tiles) == 1  # of a ResNet-50 in channels last: four kernels to compile
    maps = ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7))
    assert len({choose_tile(32, c, s * s, torch.bfloat16) for c, s in maps}) <= 5


def test_what_it_serves(monkeypatch):
    def served(x, *per_channel, quietly=False):
        return triton_ops.kernels_for(x, *(per_channel or [None] * 4), quietly=quietly) is not None

    x, ones = torch.randn(4, 3, 5, 5), torch.ones(3)
    assert all(map(served, (x, x.contiguous(memory_format=torch.channels_last), x[:0], x.double(), x[1:])))
    for other in (x.transpose(2, 3), x[..., ::2], x[:1].expand(4, 3, 5, 5), torch._neg_view(x)):
        assert not served(other)
    assert not served(x.as_subclass(type("Other", (torch.Tensor,), {})))
    assert not served(x.to("meta"))
    assert not served(x.to_sparse())
    assert not served(x, quietly=True)  # unasked the interpreter is not taken
    assert not served(x, ones, None, ones, None)
    assert not served(x, torch.ones(6)[::2], None, None, None)
    assert not served(x, ones, None, ones, ones.double())
    with torch.inference_mode():
        assert not served(x, None, None, torch.ones(3), torch.ones(3))
    monkeypatch.setattr(launch, "IS_INTERPRETED", False)
    with pytest.warns(RuntimeWarning, match="SYNCBN_KERNELS=triton: expected Triton to serve, got tensors on cpu"):
        assert not served(x)


def test_tracers_see_operators_and_observers_see_few():
    layer = syncbn.SyncBatchNorm(3)
    x, per_channel = torch.randn(4, 3, 5, 5), (layer.weight, layer.bias, layer.running_mean, layer.running_var)
    chosen = []

    def choose(x):
        chosen.append(backends.choose(x, *per_channel))
        return x * 2

    with syncbn.use_kernels("triton"):
        make_fx(choose)(x)
        traced(lambda: choose(x))
    assert chosen[0] is reference
    assert isinstance(chosen[1], launch.TritonKernels)


@pytest.mark.parametrize("phase", ["forward_reduce", "forward_apply", "backward_reduce", "backward_apply"])
def test_a_failed_self_check_warns_once_and_other_kernels_go_on(monkeypatch, phase):
    monkeypatch.setattr(triton_ops, "_passed", {})
    right = getattr(launch.TritonKernels, phase)

    def wrong(*args):
        result = right(*args)
        (result if isinstance(result, torch.Tensor) else result[0]).mul_(1.01)
        return result

    x = torch.randn(4, 3, 5, 5)
    monkeypatch.setattr(launch.TritonKernels, phase, wrong)
    with pytest.warns(RuntimeWarning, match=f"syncbn.ops.triton was compared.*{phase}") as caught:
        assert triton_ops.kernels_for(x, *[None] * 4, quietly=False) is None
    assert sum("was compared" in str(warning.message) for warning in caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert triton_ops.kernels_for(x, *[None] * 4, quietly=False) is None
        assert triton_ops.kernels_for(x.half(), *[None] * 4, quietly=False) is None  # trusted no more
        with syncbn.use_kernels("triton"):
            assert not isinstance(backends.choose(x, *[None] * 4), launch.TritonKernels)


def test_an_interrupted_check_decides_nothing(monkeypatch):
    monkeypatch.setattr(triton_ops, "_passed", {})
    with monkeypatch.context() as patch:
        patch.setattr(selfcheck, "passes", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            kernels_for(torch.randn(4, 3, 5, 5))
    assert triton_ops._passed == {}
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(launch.TritonKernels, "forward_reduce", lambda *_: 1 / 0)
        with pytest.raises(RuntimeWarning, match="ZeroDivisionError"):
            kernels_for(torch.randn(4, 3, 5, 5))
    assert [*triton_ops._passed.values()] == [False]


@pytest.mark.parametrize(("layout", "dtype"), [(None, torch.float32), (torch.channels_last, torch.float16)])
def test_the_self_check_runs_every_loop_of_the_very_kernels(monkeypatch, layout, dtype):
    """Each program has several tiles, there are two blocks of channels, and the batch is counted."""
    monkeypatch.setattr(triton_ops, "_passed", {})
    made, init = [], launch.TritonKernels.__init__
    monkeypatch.setattr(launch.TritonKernels, "__init__", lambda self, *args: made.append(args) or init(self, *args))
    layer = syncbn.SyncBatchNorm(3)
    found = triton_ops.kernels_for(
        laid_out(torch.randn(4, 3, 5, 5), layout).to(dtype),
        *(layer.weight, layer.bias, layer.running_mean, layer.running_var),
        quietly=False,
    )
    (tile, (outer, channels, inner), splits, _), (own, *_) = made
    assert tile == own == found.constants[:4]
    assert splits == (3, 3)
    assert -(-outer // tile.rows) * -(-inner // tile.width) > 2 * 3
    assert -(-channels // tile.block) == 2


def test_a_counter_of_any_dtype():
    x, found = torch.randn(4, 3, 5, 5), kernels_for(torch.randn(4, 3, 5, 5))
    for counted in (torch.tensor(3, dtype=torch.int32), torch.tensor(3.0), torch.tensor(3)):
        mean, var = torch.zeros(3), torch.ones(3)
        packed = found.forward_reduce(x, counted)
        found.forward_apply(x, packed, None, None, Running(mean, var, counted, None), 1e-5)
        assert counted == 4
        torch.testing.assert_close(mean, x.mean((0, 2, 3)) / 4)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, under the interpreter
def test_infinite_statistics_stay_where_all_ranks_are_empty():
    x, mean, var = torch.randn(0, 3, 5), torch.tensor([0.0, math.inf, 1.0]), torch.tensor([math.inf, 1.0, 1.0])
    found = kernels_for(x, None, None, mean, var)
    found.forward_apply(x, found.forward_reduce(x), None, None, Running(mean, var, None, 0.1), 1e-5)
    assert mean.tolist() == [0.0, math.inf, 1.0]
    assert var.tolist() == [math.inf, 1.0, 1.0]


def test_a_kind_is_checked_once_and_not_while_a_graph_is_captured(monkeypatch):
    checked, passes = [], selfcheck.passes
    monkeypatch.setattr(triton_ops, "_passed", {})
    monkeypatch.setattr(selfcheck, "passes", lambda *args: checked.append(args[3]) or passes(*args))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    x = torch.randn(4, 3, 6, 6)
    with pytest.warns(RuntimeWarning, match="captured before"):
        assert triton_ops.kernels_for(x, *[None] * 4, quietly=False) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for shape in ((4, 3, 6, 6), (4, 3, 6, 6), (4, 4, 6, 6), (4, 3, 12, 5)):  # of one kind
        assert triton_ops.kernels_for(torch.randn(shape), *[None] * 4, quietly=False)
    assert len(checked) == 1
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.warns(RuntimeWarning, match="captured before"):  # the table of the layers has those of known inputs
        assert triton_ops.kernels_for(x, *[None] * 4, quietly=False) is None


def test_a_graph_has_memory_of_its_own():
    """What is captured may be replayed on any stream, beside what runs eagerly."""
    x = torch.randn(5, 4, 40, 40)
    found = kernels_for(x)
    assert found.splits[0] > 1
    eager = found.forward_reduce(x)
    kept, workspaces = dict(found.ready), dict(launch._workspaces)
    found.is_capturing = lambda: True
    assert torch.equal(found.forward_reduce(x), eager)
    assert found.ready == kept
    assert {key: value[0] is workspaces[key][0] for key, value in launch._workspaces.items()} == dict.fromkeys(
        workspaces, True
    )
    assert found._workspace(0, True)[1] is not found._workspace(0, True)[1]
    assert found._workspace(0, False)[1] is found._workspace(0, False)[1]
    assert found._workspace(0, False)[1] is not found._workspace(1, False)[1]  # of another stream
    with pytest.raises(RuntimeError, match="before a CUDA graph is captured: backward_apply is not compiled"):
        found.backward_apply(x, x, torch.ones(9).double(), None, torch.ones(8).double())


def run_on_triton(rank, world_size, cases):
    with syncbn.use_kernels("triton"):
        return run_cases(rank, world_size, cases)


OPTIONS = [{"affine": False}, {"momentum": None}, {"track_running_stats": False}, {}]


@pytest.mark.parametrize(
    "dtype", [torch.float32, *(pytest.param(t, marks=pytest.mark.slow) for t in (torch.float64, torch.bfloat16))]
)
def test_the_layer_on_ranks(run, dtype):
    """Uneven and empty ranks, two steps, against nn.BatchNorm in float64 on one process."""
    shapes = [(3, 4, 5, 5), (0, 4, 5, 5), (1, 4, 5, 5)]
    layouts = [None, "channels_last", "strided"]
    param_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    cases = [
        make_case(shapes, steps=2, dtype=dtype, param_dtype=param_dtype, layout=layout, layer=options, seed=i)
        for i, (layout, options) in enumerate(zip([*layouts, None], OPTIONS, strict=True))
    ]
    results = run(run_on_triton, 3, cases)
    for i, case in enumerate(cases):
        compare([result[i] for result in results], truth(case), case, RTOL[dtype])


@hypothesis.seed(SEED)
@settings(COMMON, max_examples=4)
@given(batch=programs(3).map(lambda p: (3, [replace(p, kernels=(("triton", "triton"),) * 3)])))
@pytest.mark.slow
def test_programs_equal_one_process(ranks, batch):
    check_programs(ranks, batch)


def trace_on_a_rank(rank, world_size):
    """Return what is launched and dispatched in a step, and how many bytes it saves beyond x and weight."""
    launched, launcher = [], launch.TritonKernels._launch
    layer, x, dy = syncbn.SyncBatchNorm(4), torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(2, 4, 6, 6)
    saved = []
    with syncbn.use_kernels("triton"), pytest.MonkeyPatch.context() as patch:
        layer(x).backward(dy)  # the self-check is over
        patch.setattr(launch.TritonKernels, "_launch", lambda *args: launched.append(args[1]) or launcher(*args))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y, forward = traced(lambda: layer(x))
        _, backward = traced(lambda: torch.autograd.grad(y, [x, *layer.parameters()], dy))
    extra = sum(t.nbytes for t in saved if t.data_ptr() not in (x.data_ptr(), layer.weight.data_ptr()))
    return launched, (forward.names, forward.launches), (backward.names, backward.launches), extra


def test_two_launches_and_one_collective_each_way(run):
    """Beside the function under torch's nn.SyncBatchNorm, on stand-ins for its operators."""
    launched, forward, backward, extra = run(trace_on_a_rank, 2)[0]
    assert launched == ["forward_reduce", "forward_apply", "backward_reduce", "backward_apply"]
    for names, operators in (forward, backward):
        assert sum(name.startswith("c10d.") for name in names) == 1
        assert not [name for name in names if any(sync in name for sync in SYNCS)]
        assert len(operators) <= 2, operators  # the collective, and on gloo the sum of what it gathers
    assert extra == (2 * 4 + 1) * 8
    native = run(traces_on_a_rank, 2)[0]["native"]
    for (_, operators), (_, native_operators) in zip((forward, backward), native, strict=True):
        assert len(operators) + 2 <= len(native_operators)  # with our two launches
