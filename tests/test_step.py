"""step.py: the C++ training step gives the bits of autograd.py, leaves alone what is not usual, and can do without."""

import contextlib
import copy
import shutil
import warnings
from unittest import mock

import pytest
import torch
from oracle import compare, lay_out, make_case, run_case, truth
from torch import nn
from torch._dynamo import compiled_autograd
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from versions import BUILDS_STEP

import syncbn
from syncbn import step
from syncbn.kernels import build, compiler

pytestmark = [
    BUILDS_STEP,
    pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler is installed"),
]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module", autouse=True)
def _built():
    """Built once; ranks find it in the cache."""
    with syncbn.use_kernels("fused"):
        assert step._is_ready()


def without_step():
    return mock.patch.object(step, "train", return_value=None)


def is_step(y):
    return y.grad_fn is not None and "Step" in y.grad_fn.name()


def train(layer, x, dy):
    """One forward and backward; returns everything that changes."""
    x = x.detach().requires_grad_(x.requires_grad)
    y = layer(x)
    if y.requires_grad:
        y.backward(dy)
    grads = [p.grad for p in layer.parameters()]
    return is_step(y), [y.detach(), x.grad, *grads, *layer.buffers()]


def twice(rank, world_size, cases):
    """Run every case by the step and by autograd.py."""
    found = []
    for make in cases:
        results = []
        for context in (syncbn.use_kernels("fused"), without_step()):
            torch.manual_seed(rank)
            layer, x, dy = make(rank)
            with syncbn.use_kernels("fused"), context:
                results += [[train(layer, x, dy), train(layer, x * 2, dy)]]
        (quick, theirs), (slow, ours) = (zip(*r, strict=True) for r in results)
        assert all(quick), make
        assert not any(slow), make
        found.append(all(same(a, b) for two in zip(theirs, ours, strict=True) for a, b in zip(*two, strict=True)))
    return found


def same(a, b):
    return a is b if a is None else a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


class Make:
    """Make a layer, an input and the gradient of its output."""

    def __init__(self, dtype=torch.float32, shape=(3, 5, 4, 3), layout=None, dy=None, needs=True, **options):
        self.dtype, self.shape, self.layout, self.dy, self.needs, self.options = (
            dtype,
            shape,
            layout,
            dy,
            needs,
            options,
        )

    def __call__(self, rank):
        shape = (self.shape[0] + rank, *self.shape[1:])
        options = {k: v for k, v in self.options.items() if k != "frozen"}
        of_layer = torch.float64 if self.dtype == torch.float64 else torch.float32
        layer = syncbn.SyncBatchNorm(shape[1], dtype=of_layer, **options)
        for p in layer.parameters():
            nn.init.normal_(p)
            p.requires_grad = not self.options.get("frozen")
        x = lay_out(torch.randn(shape).to(self.dtype), self.layout).requires_grad_(self.needs)
        dy = torch.randn(shape).to(self.dtype)
        return layer, x, self.dy(dy) if self.dy else dy

    def __repr__(self):
        return f"{vars(self)}"


def flip(dy):
    return dy.transpose(0, -1).contiguous().transpose(0, -1)


def expand(dy):
    return dy[:1, :, :1, :1].expand(dy.shape)


CASES = [
    *(Make(dtype, layout=layout) for dtype in DTYPES for layout in (None, "channels_last")),
    *(Make(shape=shape) for shape in [(4, 7), (2, 3, 9), (2, 3, 2, 3, 4), (2, 1, 1, 1), (1, 600, 2, 2), (2, 2**15)]),
    Make(dy=flip), Make(dy=expand), Make(dy=torch._neg_view), Make(torch.bfloat16, dy=flip),
    Make(affine=False), Make(bias=False), Make(track_running_stats=False), Make(frozen=True), Make(needs=False),
    Make(momentum=0.0), Make(momentum=1.0), Make(eps=0.5),
]  # fmt: skip


@pytest.mark.parametrize("world_size", [2, 3])
def test_not_a_bit_differs(run, world_size):
    for found in run(twice, world_size, CASES):
        assert dict(zip(map(str, CASES), found, strict=True)) == dict.fromkeys(map(str, CASES), True)


def run_by_step(rank, world_size, cases, others):
    """Ranks in ``others`` go without the step: the exchanges are the same."""
    with syncbn.use_kernels("fused"), without_step() if rank in others else mock.MagicMock():
        return [run_case(rank, case) for case in cases]


def trained_apart(rank, world_size):
    """Some ranks by the step, the others not: one has no values, one a single value per channel."""
    layer = syncbn.SyncBatchNorm(3, dtype=torch.float64)
    shape = {0: (2, 3, 5), 1: (0, 3, 5), 2: (1, 3, 1)}.get(rank, (rank, 3, 2))
    taken = set()
    for seed in range(40):
        torch.manual_seed(100 * seed + rank)
        x = (torch.randn(shape, dtype=torch.float64) + 3).requires_grad_()
        with syncbn.use_kernels("fused"):
            y = layer(x)
        taken.add(is_step(y))
        y.square().sum().backward()
    return taken, layer.running_mean.tolist(), layer.running_var.tolist()


@pytest.mark.parametrize("world_size", [4, *(pytest.param(w, marks=pytest.mark.slow) for w in (5, 6))])
def test_all_ranks_have_the_same_bits_whoever_takes_the_step(run, world_size):
    taken, *statistics = zip(*run(trained_apart, world_size), strict=True)
    assert list(taken) == [{rank not in (1, 2)} for rank in range(world_size)]
    for of_ranks in statistics:
        assert all(of_rank == of_ranks[0] for of_rank in of_ranks)


@pytest.mark.parametrize("others", [(), (1,), (0, 2)])
def test_equals_one_process(run, others):
    options = [{}, {"layer": {"affine": False}}, {"frozen_weight": True}, {"layer": {"momentum": None}}]
    splits = [[2, 2, 2], [1, 4, 2], [0, 3, 0], [1, 0, 1]]
    cases = [
        make_case([(n, 3, 4, 3) for n in split], steps=2, layout=layout, **more)
        for split in splits
        for layout in (None, "channels_last", "strided")
        for more in options
    ]
    results = run(run_by_step, 3, cases, others)
    for i, case in enumerate(cases):
        compare([result[i] for result in results], truth(case), case, 1e-10)


def second_order(rank, world_size):
    """The gradient of a gradient's norm, by the step and by autograd.py."""
    found = []
    for context in (syncbn.use_kernels("fused"), without_step()):
        torch.manual_seed(rank)
        layer = syncbn.SyncBatchNorm(4, dtype=torch.float64)
        x = torch.randn(3 + rank, 4, 5, dtype=torch.float64, requires_grad=True)
        with syncbn.use_kernels("fused"), context:
            y = layer(x)
            (g,) = torch.autograd.grad((y * y.detach().cos()).square().sum(), x, create_graph=True)
            g.square().sum().backward()
        found.append((is_step(y), g.detach(), x.grad, layer.weight.grad, layer.bias.grad))
    (quick, *ours), (slow, *theirs) = found
    assert quick
    assert not slow
    return [torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)]


def test_second_order(run):
    assert run(second_order, 2) == [[True] * 4] * 2


class Nothing(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Traced(torch.Tensor):
    pass


def what_is_left_alone(rank, world_size):
    layer, x = syncbn.SyncBatchNorm(3), torch.randn(2, 3, 4, requires_grad=True)
    found = {}

    def note(name, layer=layer, x=x):
        found[name] = is_step(layer(x))

    with syncbn.use_kernels("native"):
        note("native")
    with syncbn.use_kernels("fused"):
        note("usual")
        note("none")
        note("one value", x=torch.randn(1, 3, requires_grad=True))
        note("cumulative", syncbn.SyncBatchNorm(3, momentum=None))
        note("half statistics", copy.deepcopy(layer).half(), x.half())
        with Nothing():
            note("traced")
        other = copy.deepcopy(layer)
        other.weight = nn.Parameter(torch.ones(6)[::2])
        note("strided weight", other)
        regions = []
        for reentrant in (False, True):
            y = checkpoint(lambda x: regions.append(is_step(layer(x))) or layer(x), x, use_reentrant=reentrant)
            y.square().sum().backward()
        found["checkpoint"] = any(regions[:2])
        with torch.inference_mode():
            found["inference"] = layer(torch.randn(2, 3, 4)).shape == (2, 3, 4)
            other = syncbn.SyncBatchNorm(3)
            with CommDebugMode() as counted:
                layer(torch.randn(2, 3, 4))
            found["inference, traced"] = counted.get_total_counts() == 0
        with torch.no_grad(), pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
            other(torch.randn(2, 3, 4))
    return found


def test_what_is_not_usual_is_left_to_python(run):
    usual = {"usual", "none", "inference"}
    for found in run(what_is_left_alone, 2):
        assert {name for name, taken in found.items() if taken} == usual


def gradients(rank, world_size):
    """Backward passes of unusual kinds, by the step and by autograd.py."""
    torch.manual_seed(rank)
    layer = syncbn.SyncBatchNorm(3, dtype=torch.float64)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    dys = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    results = []
    for context in (syncbn.use_kernels("fused"), without_step()):
        with syncbn.use_kernels("fused"), context:
            y = layer(x)
            part = torch.autograd.grad(y, layer.weight, dys[0], retain_graph=True)  # x is not asked for, and exchanged
            whole = torch.autograd.grad(y, [x, layer.bias], dys[0], retain_graph=True)
            with Nothing():
                traced = torch.autograd.grad(y, x, dys[1], retain_graph=True)
            left_out = torch.autograd.grad(torch.zeros(1, requires_grad=True).sum() + 0 * y[0, 0, 0], x)
            results.append([*part, *whole, *traced, *left_out])
    return [torch.equal(a, b) for a, b in zip(*results, strict=True)]


def test_unusual_backward_passes(run):
    assert run(gradients, 2) == [[True] * 5] * 2


def many_threads(rank, world_size):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        return twice(
            rank, world_size, [Make(shape=(8, 64, 32, 33)), Make(shape=(8, 64, 32, 33), layout="channels_last")]
        )
    finally:
        torch.set_num_threads(before)


def test_several_threads(run):
    assert run(many_threads, 2) == [[True, True]] * 2


def in_place(rank, world_size):
    with syncbn.use_kernels("fused"):
        layer, x = syncbn.SyncBatchNorm(3), torch.randn(2, 3, 4, requires_grad=True)
        version = layer.running_mean._version
        y = layer(x * 1)
        changed = layer.running_mean._version > version
        with torch.no_grad():
            layer.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.square().sum().backward()
        return changed


def compiled_backward(rank, world_size):
    torch.manual_seed(rank)
    layer, x = syncbn.SyncBatchNorm(3), torch.randn(2, 3, 4, requires_grad=True)
    grads = []
    for context in (contextlib.nullcontext(), compiled_autograd._enable(torch.compile(backend="eager"))):
        with syncbn.use_kernels("fused"):
            y = layer(x)
        assert is_step(y)
        x.grad = None
        with context:
            y.backward(torch.arange(24.0).view(2, 3, 4))
        grads.append(x.grad)
    return torch.equal(*grads)


def test_compiled_autograd(run):
    assert run(compiled_backward, 2) == [True, True]


def lost_weight(rank, world_size):
    with syncbn.use_kernels("fused"):
        layer = syncbn.SyncBatchNorm(3)
        y = layer(torch.randn(2, 3, 4, requires_grad=True))
    layer.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="expected the weight to be in memory in the backward pass"):
        y.square().sum().backward()


def no_gradient_for_what_is_not_saved(rank, world_size):
    """An error of the step that is not of its exchange is not blamed on it."""
    with torch.inference_mode():
        x = torch.randn(2, 3, 4)
    with syncbn.use_kernels("fused"), pytest.raises(RuntimeError, match="Inference tensors cannot") as caught:
        syncbn.SyncBatchNorm(3)(x)
    assert "exchange" not in str(caught.value)


@pytest.mark.parametrize("function", [lost_weight, no_gradient_for_what_is_not_saved])
def test_errors(run, function):
    run(function, 2)


def test_in_place_changes_are_seen(run):
    assert run(in_place, 2) == [True, True]


def forget(monkeypatch, **what):
    monkeypatch.setattr(step, "_asked", set())
    monkeypatch.setattr(step, "_train", None)
    for name, value in what.items():
        monkeypatch.setattr(build, name, value)


@pytest.mark.parametrize("keeps", [True, False])
def test_auto_builds_what_can_be_kept_and_fails_quietly(monkeypatch, keeps):
    load = mock.Mock(side_effect=RuntimeError("no such header"))
    forget(monkeypatch, load=load, keeps=lambda: keeps)
    with syncbn.use_kernels("auto"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not step._is_ready()
    assert load.called == keeps


@pytest.mark.parametrize("name", ["native", "reference"])
def test_other_kernels_do_without(monkeypatch, name):
    forget(monkeypatch, load=mock.Mock(side_effect=AssertionError("built")))
    with syncbn.use_kernels(name):
        assert not step._is_ready()


def test_nobody_who_traces_starts_the_search(monkeypatch):
    forget(monkeypatch, load=mock.Mock(side_effect=AssertionError("built")))
    with syncbn.use_kernels("fused"), Nothing():
        assert step.train(torch.randn(4, 3), None, None, None, None, None, 0.1, 1e-5, None) is None


def test_without_torchs_headers_python_goes_on(monkeypatch):
    forget(monkeypatch)
    monkeypatch.setattr(compiler, "run", mock.Mock(side_effect=RuntimeError("no such header")))
    with syncbn.use_kernels("fused"), pytest.warns(RuntimeWarning, match="expected to build or load.*no such header"):
        assert not step._is_ready()
    with syncbn.use_kernels("fused"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not step._is_ready()  # said once
