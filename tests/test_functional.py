"""Second order, compilation, collectives and memory of the training step; bad input."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracle import compare, make_case, run_case, truth
from ranks import RankError
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import syncbn
from syncbn.functional import sync_batch_norm

SHAPES = [(2, 3, 2, 2), (1, 3, 2, 2)]


def penalty(layer, x):
    """A WGAN-GP-like term: the norm of the input gradient of a nonlinear score, summed over samples."""
    (gradient,) = torch.autograd.grad((layer(x) ** 3).sum(), x, create_graph=True)
    return (gradient.flatten(1).square().sum(1) + 1e-3).sqrt().sum()


def second_order(rank, world_size, xs, frozen):
    layer = syncbn.SyncBatchNorm(3, dtype=torch.float64)
    layer.weight.data.copy_(torch.tensor([0.5, 1.0, 2.0]))
    layer.weight.requires_grad_(not frozen)
    x = xs[rank].clone().requires_grad_()
    penalty(layer, x).backward()
    return x.grad, layer.weight.grad, layer.bias.grad


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shapes", [SHAPES, [(3, 3, 2), (0, 3, 2)], [(2, 3), (1, 3), (2, 3)]])
def test_double_backward_equals_one_process(run, shapes, frozen):
    generator = torch.Generator().manual_seed(3)
    xs = [torch.randn(s, dtype=torch.float64, generator=generator) * 3 + 1 for s in shapes]
    layer = nn.BatchNorm1d(3, dtype=torch.float64) if len(shapes[0]) < 4 else nn.BatchNorm2d(3, dtype=torch.float64)
    layer.weight.data.copy_(torch.tensor([0.5, 1.0, 2.0]))
    x = torch.cat(xs).requires_grad_()
    penalty(layer, x).backward()
    results = run(second_order, len(shapes), xs, frozen)
    limits = {"rtol": 1e-8, "atol": 1e-10}
    torch.testing.assert_close(torch.cat([dx for dx, _, _ in results]), x.grad, **limits)
    torch.testing.assert_close(sum(db for _, _, db in results), layer.bias.grad, **limits)
    if not frozen:
        torch.testing.assert_close(sum(dw for _, dw, _ in results), layer.weight.grad, **limits)


def gradgradcheck(rank, world_size):
    """Every rank perturbs its own copy of the whole batch; the slices and the sum tie the ranks together."""
    generator = torch.Generator().manual_seed(5)
    whole, weight, bias = (
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in ((3, 2, 2), 2, 2)
    )

    def function(whole, weight, bias):
        part = Slice.apply(whole, rank)
        y = sync_batch_norm(part, None, None, Share.apply(weight), Share.apply(bias), True)
        return Gather.apply(y, rank)

    return torch.autograd.gradcheck(
        function, (whole, weight, bias), nondet_tol=1e-12
    ) and torch.autograd.gradgradcheck(function, (whole, weight, bias), nondet_tol=1e-12)


PARTS = [slice(0, 1), slice(1, 3)]


def _sum(x):
    x = x.clone()
    dist.all_reduce(x)
    return x


class Slice(torch.autograd.Function):
    """Take this rank's part; the gradient is the parts of all ranks joined."""

    @staticmethod
    def forward(ctx, whole, rank):
        ctx.rank, ctx.shape = rank, whole.shape
        return whole[PARTS[rank]].clone()

    @staticmethod
    def backward(ctx, grad):
        return Gather.apply(grad, ctx.rank), None


class Gather(torch.autograd.Function):
    """Join the parts of all ranks; the gradient is this rank's part of it."""

    @staticmethod
    def forward(ctx, part, rank):
        ctx.rank = rank
        whole = part.new_zeros(3, *part.shape[1:])
        whole[PARTS[rank]] = part
        return _sum(whole)

    @staticmethod
    def backward(ctx, grad):
        return Slice.apply(grad, ctx.rank), None


class Share(torch.autograd.Function):
    """Use one parameter on all ranks; the gradient is the sum over ranks, whose own gradient is the identity."""

    @staticmethod
    def forward(ctx, parameter):
        return parameter.clone()

    @staticmethod
    def backward(ctx, grad):
        return Sum.apply(grad)


class Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return _sum(x)

    @staticmethod
    def backward(ctx, grad):
        return Share.apply(grad)


def test_gradgradcheck(run):
    assert run(gradgradcheck, 2) == [True, True]


def compiled(rank, world_size, cases, backend):
    torch._dynamo.reset()
    out = []
    for case in cases:
        layer = syncbn.SyncBatchNorm(case.num_features, dtype=case.dtype, **case.layer)
        out.append(run_case(rank, case, layer=torch.compile(layer, fullgraph=True, backend=backend)))
    return out


def compile_cases():
    """Also for torch 2.11, which can make compiled gradients zero without a word; `compare` sees that."""
    shapes = [(2, 3, 4, 3), (3, 3, 4, 3)]
    return [
        make_case(shapes, steps=2, dtype=torch.float32),
        make_case(shapes, steps=2, layer={"momentum": None}),
        make_case([(2, 3, 4, 3), (0, 3, 4, 3)], steps=2),
        make_case([(1, 3), (1, 3)], layer={"affine": False, "track_running_stats": False}),
    ]


def check_compiled(run, backend, timeout):
    cases = compile_cases()
    results = run(compiled, 2, cases, backend, timeout=timeout)
    for i, case in enumerate(cases):
        result = [{k.removeprefix("_orig_mod."): v for k, v in r[i].items()} for r in results]
        compare(result, truth(case), case, 2e-5 if case.dtype == torch.float32 else 1e-10)


def test_fullgraph_compile(run):
    check_compiled(run, "aot_eager", timeout=120)


@pytest.mark.slow
def test_fullgraph_inductor(run):
    check_compiled(run, "inductor", timeout=400)


def compiled_group(rank, world_size):
    torch._dynamo.reset()
    layer = syncbn.SyncBatchNorm(3, process_group=2)
    layer = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        y = layer(torch.full((2, 3), float(rank)) + torch.arange(2.0)[:, None])
    return y.detach(), layer.running_mean.clone()


@pytest.mark.slow
def test_compile_with_subgroups_made_while_tracing(run):
    results = run(compiled_group, 4, timeout=120)
    for rank in range(4):
        assert torch.equal(results[rank][1], results[rank // 2 * 2][1])
    assert not torch.equal(results[0][1], results[2][1])


def compiled_process_group(rank, world_size):
    torch._dynamo.reset()
    layer = syncbn.SyncBatchNorm(3, process_group=dist.new_group([0, 1]))
    again = pickle.loads(pickle.dumps(layer))
    x = torch.full((2, 3), float(rank)) + torch.arange(2.0)[:, None]
    for one in (layer, again):
        torch.compile(one, fullgraph=True, backend="aot_eager")(x)
    return layer.running_mean, again.running_mean


def test_compile_with_a_process_group(run):
    for given, found in run(compiled_process_group, 2, timeout=120):
        assert torch.equal(given, found)
        torch.testing.assert_close(given, torch.full((3,), 0.1))


def several_in_one_process(rank, world_size):
    """Layouts, dtypes, sizes and options in turn: the compiler generalizes over them, and must not fail."""
    formats = (torch.contiguous_format, torch.channels_last)
    worst = 0.0
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        torch._dynamo.reset()
        for options in ({}, {"affine": False}, {"bias": False, "momentum": None}, {"track_running_stats": False}):
            for i, memory_format in enumerate(formats):
                eager = syncbn.SyncBatchNorm(4, dtype=None if dtype == torch.bfloat16 else dtype, **options)
                layer = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
                x = torch.randn(2 + i + rank, 4, 5, 5 - i).to(dtype, memory_format=memory_format)
                w = torch.randn_like(x)
                inputs = [x.clone().requires_grad_() for _ in range(2)]
                for module, x in zip((eager, layer), inputs, strict=True):
                    (module(x) * w).sum().backward()
                error = (inputs[0].grad - inputs[1].grad).abs().max() / torch.finfo(dtype).eps
                worst = max(worst, error.item())
    return worst


@pytest.mark.slow
def test_compile_of_several_layouts_and_dtypes(run):
    assert max(run(several_in_one_process, 2, timeout=170)) < 100  # units of the dtype's rounding


def compiled_one_value(rank, world_size):
    torch._dynamo.reset()
    layer = torch.compile(syncbn.SyncBatchNorm(3), fullgraph=True, backend="aot_eager")
    layer(torch.ones(1 if rank else 0, 3))


def test_compiled_global_count_of_one_is_refused(run):
    with pytest.raises(RankError) as caught:
        run(compiled_one_value, 2, timeout=120)
    assert len(caught.value.errors) == 2
    assert all("more than 1 value per channel" in message for _, message in caught.value.errors.values())


class Collectives(TorchDispatchMode):
    """Note the collectives that run, with the number of elements sent."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            name = func.__name__.split(".")[0].strip("_")
            sent = torch.utils._pytree.tree_leaves(args[name == "allgather_base"])[0]  # first what it receives into
            self.seen.append((name, sent.numel(), sent.dtype))
        return func(*args, **(kwargs or {}))


def count_collectives(rank, world_size, dtype):
    layer = syncbn.SyncBatchNorm(5, dtype=torch.float64 if dtype == torch.float64 else None)
    x = torch.randn(0 if rank else 4, 5, 3, dtype=dtype).requires_grad_()
    with Collectives() as forward:
        y = layer(x)
    with Collectives() as backward:
        (y * torch.randn_like(y)).sum().backward()
    with Collectives() as no_input_grad:
        (layer(x.detach()) ** 2).sum().backward()
    layer.eval()
    with Collectives() as evaluation:
        (layer(x) ** 2).sum().backward()
        syncbn.SyncBatchNorm(5, affine=False, track_running_stats=False).eval()(torch.randn(4, 5, dtype=dtype))
    return forward.seen, backward.seen, no_input_grad.seen, evaluation.seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_collective_each_way_and_none_in_eval(run, dtype):
    for forward, backward, no_input_grad, evaluation in run(count_collectives, 2, dtype):
        assert forward == [("allgather_base", 11, torch.float64)]
        assert backward == [("allgather_base", 10, torch.float64)]
        assert no_input_grad == forward
        assert evaluation == []


def saved_bytes(rank, world_size):
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    layer = syncbn.SyncBatchNorm(64)
    x = torch.randn(4, 64, 32, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    assert y.requires_grad
    return sum(sizes.values()) - x.numel() * 4


def test_backward_keeps_the_input_and_little_else(run):
    assert all(extra <= 64 * 64 for extra in run(saved_bytes, 2))


def expanded_gradients(rank, world_size, whole):
    """A loss that sends back an expanded (stride 0) and a permuted gradient."""
    x = whole[rank : rank + 1].clone().requires_grad_()
    layer = syncbn.SyncBatchNorm(3, dtype=torch.float64)
    y = layer(x)
    scale = torch.tensor(rank + 1.0, dtype=torch.float64).expand(y.shape)
    y.backward(scale)
    first = x.grad.clone()
    y = layer(x)
    dy = torch.arange(y.numel(), dtype=torch.float64).view(y.transpose(1, 3).shape).transpose(1, 3) * (rank + 1)
    before = dy.clone()
    y.backward(dy)
    assert torch.equal(dy, before)
    return first, x.grad - first


def test_expanded_and_permuted_gradients(run):
    whole = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    x = whole.clone().requires_grad_()
    scale = torch.tensor([1.0, 2.0], dtype=torch.float64).view(2, 1, 1, 1).expand(whole.shape)
    (first,) = torch.autograd.grad(F.batch_norm(x, None, None, training=True), x, scale)
    dy = torch.arange(60, dtype=torch.float64).view(1, 5, 4, 3).transpose(1, 3)
    (second,) = torch.autograd.grad(F.batch_norm(x, None, None, training=True), x, torch.cat([dy, dy * 2]))
    for rank, (mine, other) in enumerate(run(expanded_gradients, 2, whole)):
        torch.testing.assert_close(mine, first[rank : rank + 1], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(other, second[rank : rank + 1], rtol=1e-10, atol=1e-10)


class NoGradientOnRankOne(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, rank):
        ctx.rank = rank
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return (None if ctx.rank == 1 else dy), None


def undefined_gradient(rank, world_size):
    """Autograd may pass no gradient at all on one rank: it takes part in the exchange with zeros."""
    x = torch.arange(4.0)[:, None].add(rank).requires_grad_()
    NoGradientOnRankOne.apply(syncbn.SyncBatchNorm(1)(x), rank).pow(3).sum().backward()
    return x.grad


def test_a_rank_without_gradient_takes_part(run):
    x = torch.cat([torch.arange(4.0), torch.arange(4.0) + 1])[:, None].requires_grad_()
    F.batch_norm(x, None, None, training=True)[:4].pow(3).sum().backward()
    torch.testing.assert_close(torch.cat(run(undefined_gradient, 2, timeout=40)), x.grad)


def memory_is_released(rank, world_size):
    import gc
    import weakref

    gc.disable()
    layer, x = syncbn.SyncBatchNorm(3), torch.randn(4, 3, requires_grad=True) * 1
    kept = weakref.ref(x)
    y = layer(x)
    (y**2).sum().backward()
    del x, y
    gc.enable()
    return kept() is None


def test_nothing_keeps_the_input_after_backward(run):
    assert run(memory_is_released, 2) == [True, True]


def layouts(rank, world_size, shape, memory_format):
    x = torch.randn(shape).to(memory_format=memory_format).requires_grad_()
    y = syncbn.SyncBatchNorm(shape[1])(x)
    y.backward(torch.randn_like(y).contiguous())
    return [t.is_contiguous(memory_format=memory_format) for t in (y, x.grad)]


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((2, 3, 4, 5), torch.channels_last),
        ((2, 3, 4, 5, 2), torch.channels_last_3d),
        ((2, 3, 4, 5), torch.contiguous_format),
    ],
)
def test_memory_format_is_kept(run, shape, memory_format):
    assert run(layouts, 2, shape, memory_format) == [[True, True]] * 2


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(3), "2 or more dimensions"),
        (torch.ones(2, 0, 4), "3 channels"),
        (torch.ones(2, 4, 4), "3 channels.*got 4"),
        (torch.ones(2, 3, dtype=torch.long), "floating dtype"),
        (torch.ones(2, 3, dtype=torch.complex64), "floating dtype"),
        (torch.ones(2, 3, dtype=torch.float64), "layer's dtype torch.float32"),
    ],
)
def test_bad_input_is_a_value_error(x, message, training):
    for options in ({}, {"affine": False}, {"track_running_stats": False}):
        layer = syncbn.SyncBatchNorm(3, **options).train(training)
        with pytest.raises(ValueError, match=message):
            layer(x)


@pytest.mark.parametrize("training", [True, False])
def test_channels_are_checked_without_parameters_and_statistics(training):
    layer = syncbn.SyncBatchNorm(3, affine=False, track_running_stats=False).train(training)
    with pytest.raises(ValueError, match=r"3 channels.*got 5"):
        layer(torch.randn(4, 5))


def no_eps(rank, world_size):
    with pytest.raises(ValueError, match="eps to be positive"):
        syncbn.SyncBatchNorm(3, eps=0.0)(torch.randn(2, 3))


def test_eps_of_zero_is_refused(run):
    run(no_eps, 1)
    run(no_eps, 2)


def test_zero_channels_without_parameters():
    with pytest.raises(ValueError, match="at least 1 channels"):
        sync_batch_norm(torch.ones(2, 0), None, None, training=True)


def mixed_kernels(rank, world_size, xs, dys):
    """Each rank with other kernels; the last one has no images."""
    layer = syncbn.SyncBatchNorm(5)
    layer.weight.data.copy_(torch.linspace(0.5, 1.5, 5))
    x = xs[rank].clone().requires_grad_()
    with syncbn.use_kernels(("cpu", "reference", "reference", "auto")[rank]):
        for _ in range(3):
            y = layer(x)
        (y * dys[rank]).sum().backward()
    return y.detach(), x.grad, layer.running_mean, layer.running_var


def test_ranks_may_run_other_kernels(run):
    sizes = [3, 2, 4, 0]
    generator = torch.Generator().manual_seed(7)
    xs, dys = (torch.randn(9, 5, 6, 6, generator=generator).split(sizes) for _ in range(2))
    layer = nn.BatchNorm2d(5).double()
    layer.weight.data.copy_(torch.linspace(0.5, 1.5, 5))
    x = torch.cat(xs).double().requires_grad_()
    for _ in range(3):
        y = layer(x)
    (y * torch.cat(dys)).sum().backward()
    results = run(mixed_kernels, 4, xs, dys)
    for i, expected in enumerate((y.detach(), x.grad)):
        torch.testing.assert_close(torch.cat([r[i] for r in results]).double(), expected, rtol=2e-5, atol=2e-5)
    for result in results:
        for i, expected in enumerate((layer.running_mean, layer.running_var)):
            torch.testing.assert_close(result[2 + i], results[0][2 + i], rtol=0, atol=0)
            torch.testing.assert_close(result[2 + i].double(), expected, rtol=2e-6, atol=1e-7)


def second_order_of_parameters(rank, world_size, xs, kernels):
    layer = syncbn.SyncBatchNorm(3, dtype=torch.float64)
    with syncbn.use_kernels(kernels):
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        loss = (layer(xs[rank]) ** 3 * scale).sum()  # the input needs no gradient, as in a first layer
        grads = torch.autograd.grad(loss, [layer.weight, layer.bias], create_graph=True)
        penalty = sum((g**2).sum() for g in grads) if rank == 0 else sum((g**3).sum() for g in grads)
        return torch.autograd.grad(penalty, [layer.weight, layer.bias, scale])


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_second_order_of_the_parameters_alone(run, kernels):
    xs = torch.randn(5, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).split([3, 2])
    results = run(second_order_of_parameters, 2, xs, kernels)
    layer = nn.BatchNorm1d(3, dtype=torch.float64)
    for rank, found in enumerate(results):
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        mine = layer(torch.cat(xs)).split([3, 2])[rank]
        grads = torch.autograd.grad((mine**3 * scale).sum(), [layer.weight, layer.bias], create_graph=True)
        penalty = sum((g**2).sum() for g in grads) if rank == 0 else sum((g**3).sum() for g in grads)
        expected = torch.autograd.grad(penalty, [layer.weight, layer.bias, scale])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def odd_arguments(rank, world_size):
    x, running = torch.randn(4, 3, 5), (torch.zeros(3), torch.ones(3))
    syncbn.functional.sync_batch_norm(x, *running, training=True, momentum=torch.tensor([0.5]))
    last, devices, strides = x.transpose(1, 2).contiguous().transpose(1, 2).half(), [], []
    for kernels in ("auto", "reference"):
        with torch.device("meta"), syncbn.use_kernels(kernels):
            devices.append(syncbn.SyncBatchNorm(3, device="cpu")(x).device.type)
            y = syncbn.functional.sync_batch_norm(last, None, None, training=True)
            strides.append(y.stride() == last.stride())
    return running[0], x, devices, strides


def test_odd_arguments(run):
    results = run(odd_arguments, 2)
    mean = torch.cat([x for _, x, *_ in results]).mean((0, 2))
    for running_mean, _, devices, strides in results:
        torch.testing.assert_close(running_mean, mean / 2)
        assert (devices, strides) == (["cpu"] * 2, [True] * 2)


def distributed_tensors(rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    x = distribute_tensor(torch.randn(4, 3), mesh, [Shard(0)])
    messages = []
    for is_training in (True, False):
        with pytest.raises(ValueError, match=r"plain tensors .* got a DTensor") as error:
            syncbn.SyncBatchNorm(3).train(is_training)(x)
        messages.append(str(error.value))
    layer = syncbn.SyncBatchNorm(3)
    expected = copy.deepcopy(layer)(x.to_local())
    assert torch.equal(layer(x.to_local()), expected)  # as the message says
    return messages


def test_distributed_tensors_are_refused_by_name(run):
    first, second = run(distributed_tensors, 2)
    assert first == second


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage", "ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr", "nested", "jagged"])
@pytest.mark.parametrize("is_training", [True, False])
def test_sparse_and_nested_inputs_are_refused_by_name(layout, is_training):
    if layout in ("nested", "jagged"):
        options = {"layout": torch.jagged} if layout == "jagged" else {}
        x = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(5, 4)], **options)
    else:
        x = torch.randn(4, 4).to_sparse() if layout == "sparse_coo" else torch.randn(4, 4).to_sparse_csr()
    with pytest.raises(ValueError, match="expected a dense input"):
        syncbn.SyncBatchNorm(4).train(is_training)(x)
