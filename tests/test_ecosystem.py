"""What is used beside training: averaged models, sharding, functional calls, parameter groups, tracing and export."""

import copy
import warnings

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from versions import GRAPH_REPEATS_EXCHANGES, SHARDS_ON_CPU

import syncbn
from syncbn.compat import DDP_OPTIONS

SPLITS = [[3, 3], [5, 1], [1, 5, 0]]


def net(momentum=0.1):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, momentum=momentum), nn.ReLU(), nn.Conv2d(6, 4, 3)]
    return nn.Sequential(*layers, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)).double()


def batch(step, size):
    return torch.randn(size, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step)) * 2 + 0.5


def batches(sizes, rank=None, steps=3):
    """The batches of ``steps`` steps: whole, or what one rank has of them."""
    whole = [batch(step, sum(sizes)) for step in range(steps)]
    return whole if rank is None else [x.split(sizes)[rank] for x in whole]


def train(model, xs, scale, each_step=lambda: None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for x in xs:
        optimizer.zero_grad()
        ((model(x) ** 3).sum() * scale).backward()
        optimizer.step()
        each_step()
    return model


def averaged(model, xs, scale, options, wrap=lambda model: model):
    """Train with an averaged copy, then give the copy statistics of its own over the same data."""
    average = AveragedModel(model, **options)
    train(wrap(model), xs, scale, lambda: average.update_parameters(model))
    before = {k: v.clone() for k, v in average.module.state_dict().items()}
    update_bn(xs, average)
    momenta = [m.momentum for m in average.module.modules() if isinstance(m, _BatchNorm)]
    return before, average.module.state_dict(), momenta


AVERAGES = [{}, {"use_buffers": True}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}]


def averaged_rank(rank, world_size, sizes, which, momentum):
    xs = batches(sizes, rank)
    scale = world_size / sum(sizes)
    return averaged(syncbn.convert(net(momentum)), xs, scale, AVERAGES[which], DistributedDataParallel)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(("sizes", "which"), [([3, 3], 0), ([5, 1], 1), ([1, 5, 0], 2)], ids=str)
def test_averaged_model_and_update_bn(run, sizes, which, momentum):
    """update_bn sets momentum to None, for the cumulative average, and runs in training mode on all ranks."""
    expected = averaged(net(momentum), batches(sizes), 1 / sum(sizes), AVERAGES[which])
    assert expected[2] == [momentum, 0.1]
    for result in run(averaged_rank, len(sizes), sizes, which, momentum):
        close(result, expected)


def sharded(rank, world_size, sizes, per_layer):
    mesh = init_device_mesh("cpu", (world_size,))
    model = syncbn.convert(net())
    if per_layer:
        for layer in model:
            if list(layer.parameters()):
                fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, batches(sizes, rank), world_size / sum(sizes))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert syncbn.convert(model) is model  # nothing is left to convert
    with pytest.raises(ValueError, match="convert, then compile, shard or wrap"):
        syncbn.convert(model, process_group=1)
    return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in model.state_dict().items()}


@SHARDS_ON_CPU
@pytest.mark.parametrize("per_layer", [False, True], ids=["whole", "every layer"])
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_fully_shard_equals_one_process(run, sizes, per_layer):
    model = train(net(), batches(sizes), 1 / sum(sizes))
    for state in run(sharded, len(sizes), sizes, per_layer):
        close(state, model.state_dict())


def sharded_and_replicated(rank, world_size, sizes, is_part):
    """HSDP; ``is_part``: in half of the world, the other half does the same on its own."""
    shape, names = ((2, 2, 1), ("half", "replicate", "shard")) if is_part else ((2, 2), ("replicate", "shard"))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)["replicate", "shard"]
    model = syncbn.convert(net(), process_group=mesh)
    for layer in (model[0], model[3], model[6]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, batches(sizes, rank % len(sizes)), len(sizes) / sum(sizes))
    return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in model.state_dict().items()}


@SHARDS_ON_CPU
@pytest.mark.parametrize("sizes", [[2, 1, 0, 3], [4, 2]], ids=["the world", "half of it"])
def test_hsdp_takes_its_mesh_as_process_group(run, sizes):
    model = train(net(), batches(sizes), 1 / sum(sizes))
    for state in run(sharded_and_replicated, 4, sizes, len(sizes) == 2):
        close(state, model.state_dict())


def sharded_in_bfloat16(rank, world_size):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = syncbn.convert(net().float())
    fully_shard(model, mp_policy=policy)
    seen = []
    model[1].register_forward_hook(lambda _, args, y: seen.append((args[0].detach(), y.detach())))
    x = batch(0, 6).float()[rank::world_size]
    (model(x).float() ** 3).sum().backward()
    assert all(torch.isfinite(p.grad.full_tensor()).all() for p in model.parameters())
    return *seen[0], model[1].running_mean, model[1].running_var


@SHARDS_ON_CPU
def test_fully_shard_with_mixed_precision(run):
    results = run(sharded_in_bfloat16, 2)
    x, y = (torch.cat([result[i] for result in results]) for i in (0, 1))
    assert x.dtype == y.dtype == torch.bfloat16
    layer = nn.BatchNorm2d(6, dtype=torch.float64)
    expected = layer(x.double())
    assert (y.double() - expected).abs().max() < 2**-8 * expected.abs().max()
    for _, _, mean, var in results:
        assert mean.dtype == torch.float32  # buffers keep their dtype
        torch.testing.assert_close(mean.double(), layer.running_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(var.double(), layer.running_var, rtol=1e-6, atol=1e-6)


def called(model, x):
    """One model object, other parameters and buffers: meta-learning and ensembles do this."""
    parameters = {n: (p.detach() * 1.5).requires_grad_() for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    untouched = copy.deepcopy(model.state_dict())
    y = torch.func.functional_call(model, (parameters, buffers), (x,))
    inner = torch.autograd.grad((y**3).sum(), list(parameters.values()))
    torch.testing.assert_close(model.state_dict(), untouched, rtol=0, atol=0)
    return inner, buffers


def called_rank(rank, world_size, sizes):
    return called(syncbn.convert(net()), batches(sizes, rank)[0])


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_functional_call(run, sizes):
    gradients, buffers = called(net(), batches(sizes)[0])
    results = run(called_rank, len(sizes), sizes)
    close([sum(parts) for parts in zip(*(r[0] for r in results), strict=True)], list(gradients))
    for result in results:
        close(result[1], buffers)


def groups(model):
    """No weight decay on normalization: by class, as detectron2 does, found before or after conversion."""
    norms = [p for m in model.modules() if isinstance(m, _BatchNorm) for p in m.parameters()]
    rest = [p for p in model.parameters() if not any(p is q for q in norms)]
    return [{"params": rest, "weight_decay": 0.3}, {"params": norms, "weight_decay": 0.0}]


def decayed(model, xs, scale, optimizer):
    for x in xs:
        optimizer.zero_grad()
        ((model(x) ** 3).sum() * scale).backward()
        optimizer.step()
    return model.state_dict(), optimizer.state_dict()


def decayed_rank(rank, world_size, sizes, when):
    model = net()
    if when == "after":
        syncbn.convert(model)
    optimizer = torch.optim.AdamW(groups(model), lr=0.01)
    syncbn.convert(model)
    ddp = DistributedDataParallel(model, **DDP_OPTIONS)
    _, state = decayed(ddp, batches(sizes, rank), world_size / sum(sizes), optimizer)
    return model.state_dict(), state


@pytest.mark.parametrize("when", ["before", "after"])
def test_parameter_groups_made_before_or_after_conversion(run, when):
    sizes, model = [5, 1], net()
    expected = decayed(model, batches(sizes), 1 / 6, torch.optim.AdamW(groups(model), lr=0.01))
    for result in run(decayed_rank, 2, sizes, when):
        # Adam divides by the size of the gradient
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-7)


def traced_forward(rank, world_size, sizes):
    """symbolic_trace of what the user wrote; the graph's module converts like any other."""
    graph = syncbn.convert(torch.fx.symbolic_trace(net()))
    assert sum(isinstance(m, syncbn.SyncBatchNorm) for m in graph.modules()) == 2
    graph(batch(0, sum(sizes)).split(sizes)[rank])
    return graph.state_dict()


def test_a_traced_model_converts(run):
    model, sizes = net(), [5, 1]
    model(batch(0, 6))
    for state in run(traced_forward, 2, sizes):
        close(state, model.state_dict())


def trained(rank, world_size, sizes):
    model = syncbn.convert(net())
    train(DistributedDataParallel(model), batches(sizes, rank), world_size / sum(sizes))
    return syncbn.revert(model).eval()


@pytest.fixture(scope="module")
def deployed(ranks):
    """A model that trained on two ranks and was reverted, and the same from one process."""
    model, other = ranks.run(trained, 2, [5, 1])
    expected = train(net(), batches([5, 1]), 1 / 6).eval()
    close(model.state_dict(), expected.state_dict())
    close(other.state_dict(), expected.state_dict())
    expected.load_state_dict(model.state_dict())
    return model, expected


def symbolic_trace(model, x):
    return torch.fx.symbolic_trace(model)(x)


def fx_fusion(model, x):
    from torch.fx.experimental.optimization import fuse

    fused = fuse(model)
    assert not any(isinstance(m, _BatchNorm) for m in fused.modules())
    return fused(x)


def export(model, x):
    program = torch.export.export(model, (x,))
    assert any(node.target is torch.ops.aten.batch_norm.default for node in program.graph.nodes)
    return program.module()(x)


def script(model, x):
    with warnings.catch_warnings():  # torch has deprecated TorchScript; models that use it are still around
        warnings.filterwarnings("ignore", "`torch.jit.*` is deprecated")
        return torch.jit.script(model)(x)


def trace(model, x):
    with warnings.catch_warnings():  # as above
        warnings.filterwarnings("ignore", "`torch.jit.*` is deprecated")
        return torch.jit.trace(model, x)(x)


def eager_fusion(model, x):
    fused = torch.ao.quantization.fuse_modules(model, [["0", "1", "2"], ["3", "4"]])
    assert not any(isinstance(m, _BatchNorm) for m in fused.modules())
    return fused(x)


@pytest.mark.parametrize("tool", [symbolic_trace, fx_fusion, export, script, trace, eager_fusion])
def test_tools_after_revert(deployed, tool):
    """The class is the user's own again, so what knows nn.BatchNorm2d by name finds it; bit for bit the same."""
    model, expected = deployed
    assert [type(m) for m in model] == [type(m) for m in expected]
    x = batch(9, 4)
    assert torch.equal(tool(model, x), tool(expected, x))
    close(tool(model, x), expected(x))


def test_export_of_a_converted_model_in_eval_mode():
    """Not reverted, it exports too: its eval mode is F.batch_norm."""
    model = syncbn.convert(net()).eval()
    x = batch(9, 4)
    close(torch.export.export(model, (x,)).module()(x), net().eval()(x))


def close(actual, expected):
    """float64 end to end: what differs is the order of sums."""
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)


def compiled_model(rank, world_size, model, xs):
    """Compile a whole model; count the collectives in its graphs, forward and backward."""
    torch._dynamo.reset()
    counts = []

    def count(graph, inputs):
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        counts.append(sum("_c10d_functional.all_" in name for name in names))
        return make_boxed_func(graph.forward)

    model = syncbn.convert(copy.deepcopy(model))
    eager, x = copy.deepcopy(model), xs[rank]
    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=count, bw_compiler=count))
    outputs = []
    for one in (eager, compiled):
        y = one(x)
        (y * torch.linspace(0, 1, y.shape[1], dtype=y.dtype)).square().sum().backward()
        outputs.append(y.detach())
    grads = [[p.grad for p in m.parameters()] for m in (eager, model)]
    return counts, outputs, grads, [list(m.buffers()) for m in (eager, model)]


def assert_compiles(run, model, num_layers):
    xs = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).split([3, 1])
    for counts, *pairs in run(compiled_model, 2, model.double(), xs, timeout=300):
        # one graph each way: as many collectives as in eager mode
        assert counts == [num_layers, 2 * num_layers if GRAPH_REPEATS_EXCHANGES else num_layers]
        for eager, compiled in pairs:
            torch.testing.assert_close(compiled, eager, rtol=1e-8, atol=1e-9)


@pytest.mark.slow
def test_a_whole_model_compiles_without_graph_break(run):
    from experiment.training.models.classifiers import ResNet8

    torch.manual_seed(0)
    model = ResNet8(num_classes=4)
    assert_compiles(run, model, sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()))


@pytest.mark.slow
def test_resnet18_compiles_without_graph_break(run):
    from torchvision.models import resnet18

    torch.manual_seed(0)
    assert_compiles(run, resnet18(num_classes=4), 20)
