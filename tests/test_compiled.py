"""Layers in a graph of torch.compile: precision, kernels per layer, recompilations. In DDP: test_ddp_order.py."""

import copy

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
    for size in (3, 3, 3) if dynamic is False else (3, 4, 5, 6, 2, 7):
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
            assert num_graphs[-1] == num_graphs[1] <= most
        assert difference < 1e-3


def losses_with(rank, world_size, settings):
    """Two steps, eager and compiled with settings of Inductor; returns the largest difference of a gradient."""
    from torch._inductor import config

    torch._dynamo.reset()
    eager = syncbn.convert(net(3))
    model = copy.deepcopy(eager)
    known = {key: value for key, value in settings.items() if hasattr(config, key)}
    with config.patch(known):
        compiled = torch.compile(model, fullgraph=True)
        for seed in (1, 2):
            x = torch.randn(2 + rank, 16, 6, 6, generator=torch.Generator().manual_seed(seed))
            step(eager, x)
            step(compiled, x)
    pairs = zip(eager.parameters(), model.parameters(), strict=True)
    return len(known), max((a.grad - b.grad).abs().max().item() for a, b in pairs)


@pytest.mark.slow
@pytest.mark.skipif(VERSION < (2, 9), reason="torch buckets and reorders these collectives since 2.9")
def test_with_the_collectives_bucketed_and_reordered(run):
    """Exchanges depend on each other, so that nothing can be gained; nothing may be lost."""
    settings = {
        "bucket_all_reduces_fx": "all",
        "bucket_all_gathers_fx": "all",
        "reorder_for_compute_comm_overlap": True,
    }
    for num_known, difference in run(losses_with, 2, settings, timeout=300):
        assert num_known == 3
        assert difference < 1e-3


def cache_counts(rank, world_size, folder):
    """Compile the same model twice, the second time as a new process would; returns counters, and gradients."""
    import os

    from torch._functorch import config

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/{rank}"
    results = []
    for _ in range(2):
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        model = syncbn.convert(net())
        with config.patch(autograd_cache_allow_custom_autograd_functions=True, strict_autograd_cache=True):
            step(torch.compile(model, fullgraph=True), torch.randn(2 + rank, 16, 6, 6))
        results.append((dict(counters["aot_autograd"]), [p.grad for p in model.parameters()]))
    (first, gradients), (second, same) = results
    return first, second, all(map(torch.equal, gradients, same))


@pytest.mark.slow
@pytest.mark.skipif(VERSION < (2, 9), reason="torch caches graphs with autograd Functions since 2.9")
def test_graphs_come_from_the_cache(run, tmp_path):
    for first, second, is_same in run(cache_counts, 2, str(tmp_path), timeout=300):
        assert first["autograd_cache_saved"] == 1
        assert second["autograd_cache_hit"] == 1
        assert is_same
