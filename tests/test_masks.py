"""Statistics that ignore padding, over all ranks: against nn.BatchNorm on the packed valid values."""

import copy

import pytest
import ranks
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.functional import sync_batch_norm
from syncbn.nn.activated import SyncBatchNormAct

C = 3
LIMITS = {torch.float64: (1e-9, 1e-10), torch.float32: (2e-5, 2e-5), torch.bfloat16: (2e-2, 2e-2)}
LIMITS[torch.float16] = 3e-3, 3e-3


def draw(shapes, seed=0, keep=0.6):
    """Inputs, bool masks (N, 1, *) and output weights of all ranks; the padding holds NaN and Inf."""
    generator = torch.Generator().manual_seed(seed)
    xs, masks, dys = [], [], []
    for shape in shapes:
        x = torch.randn(shape, dtype=torch.float64, generator=generator) * 2 + 5
        mask = torch.rand(shape[0], 1, *shape[2:], generator=generator) < keep
        x = x.masked_fill(~mask, float("nan"))
        if x.numel():
            x[0, 0] = x[0, 0].nan_to_num(float("inf"))
        xs.append(x)
        masks.append(mask)
        dys.append(torch.randn(shape, dtype=torch.float64, generator=generator))
    return xs, masks, dys


def pack(x, mask):
    """The valid positions of a tensor, (positions, C)."""
    return x.movedim(1, -1)[mask.expand(x.shape[0], 1, *x.shape[2:])[:, 0]]


def reference(xs, masks, dys, layer):
    """One process: nn.BatchNorm on all valid values. Returns packed y and dx of all ranks, gradients, statistics."""
    rows = torch.cat([pack(x, mask) for x, mask in zip(xs, masks, strict=True)]).double().requires_grad_()
    y = layer(rows)
    (y * torch.cat([pack(dy, mask) for dy, mask in zip(dys, masks, strict=True)])).sum().backward()
    gradients = [p.grad for p in layer.parameters()]
    return y.detach(), rows.grad, gradients, dict(layer.named_buffers())


def make(layer_class, dtype=torch.float64, **options):
    layer = layer_class(C, dtype=dtype, **options)
    for p in layer.parameters():
        p.data.copy_(torch.tensor([0.5, -1.0, 2.0]))
    return layer


def masked_rank(rank, world_size, xs, masks, dys, options, kernels="auto"):
    x, mask, dy = (t[rank].to(ranks.device()) for t in (xs, masks, dys))
    x.requires_grad_()
    dtype = options.pop("dtype", x.dtype)
    layer = make(syncbn.SyncBatchNorm, dtype, **options).to(x.device)
    with syncbn.use_kernels(kernels):
        y = layer(x, mask)
        assert y.dtype == x.dtype
        assert y.stride() == x.stride() or x.numel() == 0
        (y * dy).sum().backward()
    padding = ~(mask > 0).expand(x.shape[0], 1, *x.shape[2:]).expand_as(x)
    assert (y[padding] == 0).all()
    assert (x.grad[padding] == 0).all()
    buffers = {name: value.cpu() for name, value in layer.named_buffers()}
    return y.detach().cpu(), x.grad.cpu(), [p.grad.cpu() for p in layer.parameters()], buffers


def compare(results, masks, expected, dtype=torch.float64):
    rtol, atol = LIMITS[dtype]

    def close(actual, wanted):
        scale = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
        torch.testing.assert_close(actual.double(), wanted, rtol=rtol, atol=atol * scale, check_dtype=False)

    y, dx, gradients, buffers = expected
    close(torch.cat([pack(r[0], m) for r, m in zip(results, masks, strict=True)]), y)
    close(torch.cat([pack(r[1], m) for r, m in zip(results, masks, strict=True)]), dx)
    for i, gradient in enumerate(gradients):
        close(sum(r[2][i].double() for r in results), gradient)
    for result in results:
        for name, value in buffers.items():
            close(result[3][name], value.double())


SHAPES = {
    "2d": [(5, C), (3, C)],
    "3d": [(2, C, 7), (3, C, 4)],
    "4d": [(2, C, 3, 4), (1, C, 5, 2)],
    "5d": [(1, C, 2, 3, 2), (2, C, 2, 2, 2)],
    "empty": [(0, C, 4), (3, C, 5), (1, C, 3)],
}


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}, {"momentum": None}], ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_a_mask_equals_the_packed_values(run, shapes, options):
    xs, masks, dys = draw(shapes)
    if len(shapes) == 3:
        masks[2][:] = False  # a rank that is all padding
        masks[1][0] = False  # a sample
    layer = make(syncbn.SyncBatchNorm, **options)  # keys and arguments as nn.BatchNorm1d, before torch 2.13 too
    plain = nn.BatchNorm1d(C, momentum=layer.momentum, affine=layer.affine, dtype=torch.float64)
    if layer.affine and layer.bias is None:
        plain.register_parameter("bias", None)
    plain.load_state_dict(layer.state_dict())
    expected = reference(xs, masks, dys, plain)
    compare(run(masked_rank, len(shapes), xs, masks, dys, options), masks, expected)


@pytest.mark.parametrize("kernels", ["auto", "reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_back_ends(run, dtype, kernels):
    xs, masks, dys = draw([(4, C, 6, 5), (2, C, 3, 7)])
    xs, dys = [x.to(dtype) for x in xs], [dy.to(dtype) for dy in dys]
    xs[0] = xs[0].to(memory_format=torch.channels_last)
    expected = reference(xs, masks, dys, make(nn.BatchNorm1d))
    results = run(masked_rank, 2, xs, masks, dys, {"dtype": torch.float32}, kernels)
    compare(results, masks, expected, dtype)


def test_float32_stays_precise_far_from_zero(run):
    """Mean/std of 5,000: the variance within 1e-4, as without a mask."""
    xs, masks, dys = draw([(8, C, 50), (4, C, 30)])
    xs = [(x + 10_000).float() for x in xs]
    expected = reference(xs, masks, dys, make(nn.BatchNorm1d))
    for result in run(masked_rank, 2, xs, masks, [dy.float() for dy in dys], {"dtype": torch.float32}):
        torch.testing.assert_close(result[3]["running_var"].double(), expected[3]["running_var"], rtol=1e-4, atol=0)


LAYOUTS = {
    "per sample": lambda m: m[:, :, :1, :1],
    "per row": lambda m: m[:, :, :, :1],
    "one for all samples": lambda m: m[:1],
    "without leading dimensions": lambda m: m[0, 0],
    "transposed": lambda m: m.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda m: m[:, :, :1].expand(m.shape),
    "all valid": torch.ones_like,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_a_mask(run, layout):
    xs, masks, dys = draw([(3, C, 4, 5), (2, C, 4, 5)], keep=0.5)
    xs = [x.nan_to_num(1.5, 2.5) for x in xs]
    masks = [LAYOUTS[layout](mask) for mask in masks]
    full = [torch.broadcast_to(mask, (len(x), 1, 4, 5)) for x, mask in zip(xs, masks, strict=True)]
    expected = reference(xs, full, dys, make(nn.BatchNorm1d))
    compare(run(masked_rank, 2, xs, masks, dys, {}), full, expected)


def test_whole_weights_repeat_values(run):
    """A weight of 3 counts a value three times; the gradient of its input is that of all three."""
    xs, masks, dys = draw([(4, C, 6), (3, C, 5)])
    generator = torch.Generator().manual_seed(1)
    weights = [m * torch.randint(1, 4, m.shape, generator=generator).double() for m in masks]
    counts = torch.cat([pack(w, m) for w, m in zip(weights, masks, strict=True)])[:, 0].long()
    rows = torch.cat([pack(x, m) for x, m in zip(xs, masks, strict=True)]).requires_grad_()
    dy = torch.cat([pack(dy, m) for dy, m in zip(dys, masks, strict=True)])
    plain = make(nn.BatchNorm1d)
    y = plain(rows.repeat_interleave(counts, 0))[counts.cumsum(0) - 1]  # one of the equal outputs has a loss
    (y * dy).sum().backward()
    expected = y.detach(), rows.grad, [p.grad for p in plain.parameters()], dict(plain.named_buffers())
    compare(run(masked_rank, 2, xs, weights, dys, {}), masks, expected)


def weighted(x, w, weight, bias, eps=1e-5):
    mean = (w[:, None] * x).sum(0) / w.sum()
    var = (w[:, None] * (x - mean) ** 2).sum(0) / w.sum()
    return (x - mean) / (var + eps).sqrt() * weight + bias, mean, var * w.sum() / (w.sum() - 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_fractional_weights(run, dtype):
    xs, masks, dys = draw([(4, C, 6), (3, C, 5)])
    generator = torch.Generator().manual_seed(1)
    weights = [(m * torch.rand(m.shape, generator=generator, dtype=torch.float64) * 2).to(dtype) for m in masks]
    plain = make(nn.BatchNorm1d)
    rows = torch.cat([pack(x, m) for x, m in zip(xs, masks, strict=True)]).requires_grad_()
    w = torch.cat([pack(w, m) for w, m in zip(weights, masks, strict=True)])[:, 0].double()
    y, mean, var = weighted(rows, w, plain.weight, plain.bias)
    (y * torch.cat([pack(dy, m) for dy, m in zip(dys, masks, strict=True)])).sum().backward()
    plain.running_mean.lerp_(mean.detach(), 0.1)
    plain.running_var.lerp_(var.detach(), 0.1)
    plain.num_batches_tracked += 1
    expected = y.detach(), rows.grad, [p.grad for p in plain.parameters()], dict(plain.named_buffers())
    compare(run(masked_rank, 2, xs, weights, dys, {}), masks, expected)


def test_one_process_and_eval():
    (x,), (mask,), (dy,) = draw([(4, C, 6)])
    layer, plain = make(syncbn.SyncBatchNorm), make(nn.BatchNorm1d)
    x.requires_grad_()
    y = layer(x, mask=mask)
    (y * dy).sum().backward()
    result = y.detach(), x.grad, [p.grad for p in layer.parameters()], dict(layer.named_buffers())
    compare([result], [mask], reference([x.detach()], [mask], [dy], plain))
    y = layer.eval()(x, mask)
    torch.testing.assert_close(pack(y, mask), plain.eval()(pack(x, mask)))
    assert (y.masked_select(~mask) == 0).all()
    own = syncbn.SyncBatchNorm(C, track_running_stats=False, dtype=torch.float64).eval()
    torch.testing.assert_close(pack(own(x, mask), mask), nn.BatchNorm1d(C, dtype=torch.float64)(pack(x, mask)))


@pytest.mark.parametrize("freeze", [False, True], ids=["eval", "frozen"])
def test_padding_stays_out_of_gradients_by_running_statistics(freeze):
    (x,), (mask,), (dy,) = draw([(4, C, 6)])
    layer, plain = make(syncbn.SyncBatchNorm), make(nn.BatchNorm1d).eval()
    layer = syncbn.freeze(layer) if freeze else layer.eval()
    x.requires_grad_()
    y = layer(x, mask)
    (y * dy).sum().backward()
    result = y.detach(), x.grad, [p.grad for p in layer.parameters()], dict(layer.named_buffers())
    compare([result], [mask], reference([x.detach()], [mask], [dy], plain))


@pytest.mark.parametrize("training", [False, True])
def test_padding_is_0_after_an_activation(training):
    layer = SyncBatchNormAct(C).train(training)
    layer.act = nn.Sigmoid()
    mask = torch.rand(4, 1, 3, 3) < 0.5
    y = layer(torch.randn(4, C, 3, 3), mask)
    assert (y.masked_select(~mask) == 0).all()
    assert (y.masked_select(mask) > 0).all()


def nothing_valid(rank, world_size):
    layer = make(syncbn.SyncBatchNorm)
    x = torch.full((2, C, 4), float("nan"), dtype=torch.float64).requires_grad_()
    y = layer(x, torch.zeros(2, 1, 4, dtype=torch.bool))
    (y**3).sum().backward()
    return y.detach(), x.grad, layer.weight.grad, layer.running_mean, layer.running_var - 1


def test_nothing_valid_anywhere_moves_nothing(run):
    for result in run(nothing_valid, 2):
        assert all((value == 0).all() for value in result)


def penalty(y, x):
    (gradient,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    return (gradient.square() + 1e-3).sqrt().sum()


def second_order(rank, world_size, xs, masks):
    layer, x = make(syncbn.SyncBatchNorm), xs[rank].detach().requires_grad_()
    penalty(layer(x, masks[rank]), x).backward()
    return x.grad, layer.weight.grad


def test_second_order(run):
    xs, masks, _ = draw([(3, C, 4), (2, C, 5)])
    layer = make(nn.BatchNorm1d)
    rows = torch.cat([pack(x, mask) for x, mask in zip(xs, masks, strict=True)]).requires_grad_()
    (penalty(layer(rows), rows)).backward()
    results = run(second_order, 2, xs, masks)
    dx = torch.cat([pack(r[0], m) for r, m in zip(results, masks, strict=True)])
    torch.testing.assert_close(dx, rows.grad, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(results[0][1] + results[1][1], layer.weight.grad, rtol=1e-8, atol=1e-9)


def compiled_rank(rank, world_size, xs, masks, dys):
    layer = make(syncbn.SyncBatchNorm)
    compiled, results = torch.compile(layer, fullgraph=True, backend="aot_eager"), []
    for function in (layer, compiled):
        x = xs[rank].detach().requires_grad_()
        y = function(x, masks[rank])
        (y * dys[rank]).sum().backward()
        results.append((y.detach(), x.grad, layer.weight.grad, layer.bias.grad))
        layer.zero_grad()
    return results


def test_compiled_without_a_graph_break(run):
    xs, masks, dys = draw([(3, C, 4), (2, C, 5)])
    for eager, compiled in run(compiled_rank, 2, xs, masks, dys, timeout=170):
        torch.testing.assert_close(compiled, eager, rtol=1e-9, atol=1e-9)


def saved_rank(rank, world_size):
    layer, x = syncbn.SyncBatchNorm(C), torch.randn(4, C, 100, requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append((t.data_ptr(), t.numel())) or t, lambda t: t):
        y = layer(x, torch.rand(4, 1, 100) < 0.5)
    y.square().sum().backward()
    return [size for _, size in set(sizes) if size >= x.numel()]


def test_one_tensor_of_the_input_is_kept_for_backward(run):
    assert run(saved_rank, 2) == [[4 * C * 100]] * 2


class Masked(nn.Module):
    """A layer that takes its mask from the batch, between two others."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv1d(2, C, 1), syncbn.SyncBatchNorm(C), nn.Conv1d(C, 2, 1)
        self.double()

    def forward(self, x, mask, how=None):
        y = self.first(x)
        y = self.norm(y, mask) if how is None else checkpoint(self.norm, y, mask, use_reentrant=how)
        return self.last(torch.tanh(y))


def checkpointed_rank(rank, world_size, how):
    torch.manual_seed(0)
    model = Masked()
    x = torch.randn(3, 2, 5, dtype=torch.float64) + rank
    mask = torch.arange(5) < torch.tensor([5, 2, 3 * rank])[:, None, None]
    (model(x, mask, how) ** 2).sum().backward()
    return [p.grad for p in model.parameters()], dict(model.norm.named_buffers())


@pytest.mark.parametrize("how", [False, True], ids=["non-reentrant", "reentrant"])
def test_activation_checkpointing(run, how):
    torch.testing.assert_close(run(checkpointed_rank, 2, how), run(checkpointed_rank, 2, None))


def ddp_rank(rank, world_size, xs, masks):
    torch.manual_seed(0)
    model = Masked()
    ddp = DistributedDataParallel(model)
    (ddp(xs[rank][:, :2], masks[rank]) ** 2).sum().mul(world_size).backward()
    return [p.grad for p in model.parameters()]


def test_under_ddp(run):
    xs, masks, _ = draw([(3, C, 4), (2, C, 5)])
    xs = [x.nan_to_num(1.0, 2.0) for x in xs]
    torch.manual_seed(0)
    model = Masked()
    rows = torch.cat([pack(x, m) for x, m in zip(xs, masks, strict=True)])[:, :2, None]
    valid = model.last(torch.tanh(nn.BatchNorm1d(C, dtype=torch.float64)(model.first(rows))))
    padded = sum((~m).sum() for m in masks) * (model.last.bias**2).sum()  # what the last convolution makes of 0
    ((valid**2).sum() + padded).backward()
    expected = [model.first.weight.grad, model.first.bias.grad, model.last.weight.grad, model.last.bias.grad]
    for gradients in run(ddp_rank, 2, xs, masks):
        for gradient, wanted in zip([*gradients[:2], *gradients[4:]], expected, strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-9)


def func_rank(rank, world_size, xs, masks):
    layer = make(syncbn.SyncBatchNorm)

    def loss(x, weight):
        return (sync_batch_norm(x, None, None, weight, layer.bias.detach(), True, mask=masks[rank]) ** 3).sum()

    return torch.func.grad(loss, (0, 1))(xs[rank], layer.weight.detach())


def test_torch_func(run):
    xs, masks, _ = draw([(3, C, 4), (2, C, 5)])
    rows = torch.cat([pack(x, m) for x, m in zip(xs, masks, strict=True)]).requires_grad_()
    layer = make(nn.BatchNorm1d)
    (layer(rows) ** 3).sum().backward()
    results = run(func_rank, 2, xs, masks)
    torch.testing.assert_close(torch.cat([pack(r[0], m) for r, m in zip(results, masks, strict=True)]), rows.grad)
    torch.testing.assert_close(results[0][1] + results[1][1], layer.weight.grad)


def mapped_rank(rank, world_size, x, mask, in_dims):
    """One call for several problems: their masks may differ; by vmap of the output and of its gradient."""
    layer = make(syncbn.SyncBatchNorm, track_running_stats=False)
    y = torch.func.vmap(layer, in_dims)(x[rank], mask[rank])
    dx = torch.func.vmap(torch.func.grad(lambda x, mask: (layer(x, mask) ** 3).sum()), in_dims)(x[rank], mask[rank])
    masks = mask[rank] if in_dims[1] == 0 else [mask[rank]] * len(x[rank])
    singly = [part.clone().requires_grad_() for part in x[rank]]
    ys = [layer(part, mask) for part, mask in zip(singly, masks, strict=True)]
    gradients = torch.autograd.grad(sum((y**3).sum() for y in ys), singly)
    torch.testing.assert_close((y, dx), (torch.stack(ys), torch.stack(gradients)))
    nothing = torch.zeros_like(mask[rank])
    nothing.view(-1)[0] = rank == 0  # one valid position in all, or with in_dims (0, 0) of the first problem
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training, got 1 over"):
        torch.func.vmap(layer, in_dims)(x[rank], nothing)


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None)], ids=["a mask for each", "one mask"])
def test_vmap(run, in_dims):
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(2, n, C, 4, dtype=torch.float64, generator=generator) for n in (3, 2)]
    shapes = [(2, n, 1, 4) if in_dims[1] == 0 else (n, 1, 4) for n in (3, 2)]
    run(mapped_rank, 2, x, [torch.rand(shape, generator=generator) < 0.6 for shape in shapes], in_dims)


def precise_rank(rank, world_size, xs, masks):
    model = Masked()
    model.first = nn.Identity()
    return syncbn.update_bn_stats(
        model, [(xs[rank], masks[rank])] * 2, forward=lambda m, b: m.norm(b[0], mask=b[1])
    ).norm.state_dict()


def test_update_bn_stats_leaves_padding_out(run):
    xs, masks, _ = draw([(3, C, 4), (2, C, 5)])
    rows = torch.cat([pack(x, m) for x, m in zip(xs, masks, strict=True)])
    for state in run(precise_rank, 2, xs, masks):
        torch.testing.assert_close(state["running_mean"], rows.mean(0))
        torch.testing.assert_close(state["running_var"], torch.cat([rows, rows]).var(0))


def refused(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


def refused_rank(rank, world_size, what):
    """Every rank calls; only rank 1's mask is at fault where its numbers are."""
    layer, x = make(syncbn.SyncBatchNorm), torch.randn(2, C, 4, dtype=torch.float64)
    mask = torch.ones(2, 1, 4, dtype=torch.float64)
    if what in WRONG:
        if rank == 1:
            mask[0, 0, 0] = WRONG[what]
    elif what in ("one value", "weight of 0.5"):
        mask[:] = 0
        if rank == 0:
            mask[0, 0, 0] = 0.5 if what == "weight of 0.5" else 1
        mask = mask.bool() if what == "one value" else mask
    else:
        mask = BAD[what]()
    message = refused(lambda: layer(x, mask))
    assert layer.num_batches_tracked == 0
    assert (layer.running_var == 1).all()
    layer(x, torch.ones(2, 1, 4))  # the ranks are still in step
    return message


WRONG = {"negative": -1.0, "nan": float("nan"), "inf": float("inf")}
BAD = {
    "ids": lambda: torch.ones(2, 1, 4, dtype=torch.int64),
    "uint8": lambda: torch.ones(2, 1, 4, dtype=torch.uint8),
    "a list": lambda: [3, 4],
    "without channels": lambda: torch.ones(2, 4, dtype=torch.bool),
    "per channel": lambda: torch.ones(2, C, 4, dtype=torch.bool),
    "another length": lambda: torch.ones(2, 1, 5, dtype=torch.bool),
    "another batch": lambda: torch.ones(3, 1, 1, dtype=torch.bool),
    "too many dimensions": lambda: torch.ones(1, 2, 1, 4, dtype=torch.bool),
    "another device": lambda: torch.ones(2, 1, 4, device="meta"),
    "a gradient": lambda: torch.ones(2, 1, 4, requires_grad=True),
    "sparse": lambda: torch.ones(2, 1, 4).to_sparse(),
}
MESSAGES = {
    "ids": "bool or a floating dtype, got torch.strided, torch.int64",
    "uint8": "torch.uint8",
    "a list": "got list",
    "without channels": r"= \(2, 1, 4\), got \(2, 4\) .*mask.unsqueeze\(1\)",
    "per channel": r"got \(2, 3, 4\)",
    "another length": r"got \(2, 1, 5\)",
    "another batch": r"got \(3, 1, 1\)",
    "too many dimensions": r"got \(1, 2, 1, 4\)",
    "another device": "on the input's device cpu, got one on meta",
    "a gradient": "detach it",
    "sparse": "sparse",
    "negative": "weights of a mask to be 0 or more, and finite",
    "nan": "weights of a mask to be 0 or more, and finite",
    "inf": "weights of a mask to be 0 or more, and finite",
    "one value": "more than 1 value per channel when training, got 1 over all ranks",
    "weight of 0.5": "got 0.5 over all ranks .*count as numbers of values",
}


@pytest.mark.parametrize("what", MESSAGES)
def test_bad_masks_are_refused_on_all_ranks(run, what):
    first, second = run(refused_rank, 2, what)
    assert first == second
    with pytest.raises(ValueError, match=MESSAGES[what]):
        raise ValueError(first)


def test_torch_layers_take_no_mask():
    """What conversion gives back does not know masks: the error is Python's own, and names it."""
    model = syncbn.convert(nn.Sequential(nn.BatchNorm1d(C)))
    x, mask = torch.randn(4, C), torch.ones(4, 1)
    torch.testing.assert_close(copy.deepcopy(model)[0](x, mask), copy.deepcopy(model)[0](x))
    with pytest.raises(TypeError):
        syncbn.revert(model)[0](x, mask)
