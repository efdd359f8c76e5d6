"""Layers in a graph of torch.compile: precision, kernels, recompilations, caches, DDP (groups: test_ddp_order.py)."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from versions import VERSION

import syncbn

C = 6
IS_OLD = VERSION < (2, 7)  # it fuses less, and compiles anew more often
FULL = {"fullgraph": True, "backend": "aot_eager"}


def hard_inputs(kind, world_size):
    """Parts whose mean is far from 0, or whose first value is far from the mean: sums of squares would cancel."""
    x = torch.randn(2 * world_size, C, 9, 7, generator=torch.Generator().manual_seed(3))
    if kind == "large mean":
        x = x + 3000 * torch.arange(1, C + 1).view(1, C, 1, 1)
    if kind == "first value far away":
        x = x + 1000
        x[:, :, 0, 0] = 0
    return x.chunk(world_size)


def errors_of(rank, world_size, kind):
    """The largest errors of y and of the gradient of x, of the eager layer and of the compiled one."""
    torch._dynamo.reset()
    parts = hard_inputs(kind, world_size)
    joined = torch.cat(parts).double().requires_grad_()
    weights = torch.randn(joined.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = nn.BatchNorm2d(C).double()(joined)
    (expected * weights).sum().backward()
    place = slice(2 * rank, 2 * rank + 2)
    errors = []
    for compile_it in (False, True):
        layer = syncbn.SyncBatchNorm(C)
        run = torch.compile(layer, **FULL) if compile_it else layer
        x = parts[rank].clone().requires_grad_()
        with syncbn.use_kernels("reference"):
            y = run(x)
            (y * weights[place].float()).sum().backward()
        pairs = (y.detach(), expected[place].detach()), (x.grad, joined.grad[place])
        errors += [(found.double() - truth).abs().max().item() / truth.abs().max().item() for found, truth in pairs]
    return errors


@pytest.mark.parametrize("kind", ["plain", "large mean", "first value far away"])
def test_precision_in_a_graph(run, kind):
    for eager_y, eager_dx, compiled_y, compiled_dx in run(errors_of, 2, kind, timeout=120):
        assert compiled_y <= 4 * eager_y + 1e-6
        assert compiled_dx <= 4 * eager_dx + 1e-6


def net(num_layers=2):
    layers = [(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()) for _ in range(num_layers)]
    return nn.Sequential(*(module for group in layers for module in group))


def step(model, x):
    y = model(x)
    (y * torch.linspace(0, 1, y.numel()).view_as(y)).sum().backward()


def kernels_of(rank, world_size, num_layers):
    from torch._inductor import metrics

    found = []
    for convert in (lambda model: model, syncbn.convert):
        torch._dynamo.reset()
        metrics.reset()
        counters.clear()
        step(torch.compile(convert(net(num_layers)), fullgraph=True), torch.randn(4, 16, 24, 24))
        found.append(metrics.generated_kernel_count)
        assert counters["graph_break"] == {}
    return found


@pytest.mark.slow
def test_two_kernels_more_per_layer_than_plain_batchnorm(run):
    """By Inductor's own count, of both passes; one more for very small maps, whose mean it takes first."""
    [few, *_], [many, *_] = (run(kernels_of, 2, num_layers, timeout=400) for num_layers in (1, 3))
    for plain, synchronized in (few, many):
        assert plain > 4
        assert synchronized > plain
    most = 3 if IS_OLD else 2
    assert few[1] - few[0] <= most
    assert many[1] - many[0] <= 3 * most


def graphs_of(rank, world_size, dynamic):
    """The graphs that some steps with several sizes of the batch take; and the last gradients, eager and compiled."""
    torch._dynamo.reset()
    counters.clear()
    eager = syncbn.convert(net())
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, dynamic=dynamic, **FULL)
    num_graphs = []
    for size in (3, 3, 3) if dynamic is False else (3, 4, 5, 6, 2, 7, *([1] if dynamic is None else [])):
        x = torch.randn(size + rank, 16, 6, 6, generator=torch.Generator().manual_seed(size))
        for each in (eager, compiled):
            each.zero_grad()
            step(each, x)
        num_graphs.append(counters["stats"]["unique_graphs"])
    pairs = zip(eager.parameters(), model.parameters(), strict=True)
    return num_graphs, max((a.grad - b.grad).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize(
    ("dynamic", "most"),
    [(None, 2), pytest.param(False, 1, marks=pytest.mark.slow), pytest.param(True, 1, marks=pytest.mark.slow)],
)
def test_steps_do_not_compile_again(run, dynamic, most):
    for num_graphs, difference in run(graphs_of, 2, dynamic, timeout=170):
        if not IS_OLD:
            assert num_graphs[5 if dynamic is None else -1] == num_graphs[1] <= most
            assert num_graphs[-1] <= most + 1  # one of rank 0 for a single image
        assert difference < 1e-3


class Shortcut(nn.Module):
    """A residual block with a norm in its shortcut: two exchanges that do not need each other."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)) for _ in range(2)
        )

    def forward(self, x):
        return self.branches[0](x) + self.branches[1](x)


BUCKETED = {"bucket_all_reduces_fx": "all", "bucket_all_gathers_fx": "all", "reorder_for_compute_comm_overlap": True}


def gradients_with(rank, world_size, settings):
    """The collectives of both passes, and how far gradients of compiled steps are from eager ones."""
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    eager = syncbn.convert(nn.Sequential(Shortcut(), nn.ReLU()))
    model = copy.deepcopy(eager)
    with config.patch(settings):
        compiled = torch.compile(model, fullgraph=True)
        x = torch.randn(2 + rank, 16, 6, 6, generator=torch.Generator().manual_seed(1))
        _, codes = run_and_get_code(step, compiled, x)
        step(eager, x)
    pairs = zip(eager.parameters(), model.parameters(), strict=True)
    lines = [line for line in "\n".join(codes).splitlines() if "all_gather_into_tensor" in line and "=" in line]
    return len(lines), max((a.grad - b.grad).abs().max().item() for a, b in pairs)


@pytest.mark.slow
@pytest.mark.skipif(VERSION < (2, 9), reason="torch buckets and reorders these collectives since 2.9")
def test_with_the_collectives_of_branches_bucketed(run):
    for (apart, _), (together, difference) in zip(
        run(gradients_with, 2, {}, timeout=300), run(gradients_with, 2, BUCKETED, timeout=300), strict=True
    ):
        assert apart == 4
        assert together < 4
        assert difference < 1e-3


def cache_counts(rank, world_size, folder, is_allowed):
    """Compile the same model twice, the second time as a new process would; returns counters, and gradients."""
    from torch._functorch import config

    torch.manual_seed(0)
    model = syncbn.convert(net())
    x, results = torch.randn(2 + rank, 16, 6, 6), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{folder}/{rank}")
        for _ in range(2):
            torch._dynamo.reset()
            counters.clear()
            model.zero_grad()
            with config.patch(autograd_cache_allow_custom_autograd_functions=is_allowed):
                step(torch.compile(model, fullgraph=True), x)
            found = dict(counters["aot_autograd"]) | dict(counters["inductor"])
            results.append((found, [p.grad.clone() for p in model.parameters()]))
    (first, gradients), (second, same) = results
    return first, second, all(map(torch.equal, gradients, same))


@pytest.mark.slow
@pytest.mark.skipif(VERSION < (2, 9), reason="torch caches graphs with autograd Functions since 2.9")
@pytest.mark.parametrize("is_allowed", [False, True])
def test_graphs_come_from_the_cache(run, tmp_path, is_allowed):
    for first, second, is_same in run(cache_counts, 2, str(tmp_path), is_allowed, timeout=300):
        assert is_same
        if is_allowed:
            assert (first["autograd_cache_saved"], second["autograd_cache_hit"]) == (1, 1)
        else:  # torch leaves out graphs with autograd Functions, but its kernels come from the cache
            assert second["autograd_cache_bypass"] == 1
            assert (first["fxgraph_cache_miss"], second["fxgraph_cache_hit"]) == (2, 2)


def float64_of(rank, world_size, dtype):
    """The sizes of all float64 values in both graphs of a layer, and of its input."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    sizes = []

    def compiler(graph, inputs):
        values = [node.meta.get("val") for node in graph.graph.nodes]
        sizes.extend(v.numel() for v in values if isinstance(v, torch.Tensor) and v.dtype == torch.float64)
        return make_boxed_func(graph)

    torch._dynamo.reset()
    x = torch.randn(4, C, 9, 7, dtype=dtype).requires_grad_()
    step(torch.compile(syncbn.SyncBatchNorm(C), backend=aot_autograd(fw_compiler=compiler), fullgraph=True), x)
    return sizes, x.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float64_is_for_values_of_a_channel_only(run, dtype):
    for sizes, num_inputs in run(float64_of, 2, dtype):
        assert 0 < max(sizes) <= 2 * (2 * C + 1) < num_inputs  # what two ranks exchange


def in_ddp(rank, world_size, which):
    """Gradients of a model compiled in DDP, or of a compiled DDP, and the number of graphs."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = syncbn.convert(net(3))
    ddp = nn.parallel.DistributedDataParallel(torch.compile(model, **FULL) if which == "inside" else model)
    run = torch.compile(ddp, backend="aot_eager") if which == "around" else ddp
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # while torch traces
        for seed in (1, 2):
            step(run, torch.randn(2 + rank, 16, 6, 6, generator=torch.Generator().manual_seed(seed + 10 * rank)))
    return [p.grad for p in model.parameters()], counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_around_ddp_and_inside(run):
    expected, _ = run(in_ddp, 2, "eager", timeout=170)[0]
    for which in ("inside", "around"):
        for gradients, num_graphs in run(in_ddp, 2, which, timeout=170):
            assert num_graphs >= 1
            torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-3)
