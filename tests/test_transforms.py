"""torch.func and forward-mode AD in training, on several ranks: as one process with nn.BatchNorm."""

import copy

import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import syncbn
from syncbn.functional import sync_batch_norm

SIZES = [4, 2]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()


def whole():
    return torch.randn(sum(SIZES), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5


def calls(model, x):
    """The loss as a function of the parameters, with buffers of its own, and as a function of the input."""
    parameters = {k: p.detach() for k, p in model.named_parameters()}

    def of_parameters(p):
        buffers = {k: b.clone() for k, b in model.named_buffers()}
        return functional_call(model, (p, buffers), (x,)).square().sum()

    def of_input(x):
        return functional_call(model, (parameters, {k: b.clone() for k, b in model.named_buffers()}), (x,)).square()

    return parameters, of_parameters, of_input


def transformed(model, x, tangent):
    """Gradients by the parameters, which ranks sum; and what belongs to the samples of x, which ranks join."""
    parameters, of_parameters, of_input = calls(model, x)
    sums = {"grad": grad(of_parameters)(parameters)}
    sums["vjp"] = vjp(of_parameters, parameters)[1](torch.ones((), dtype=x.dtype))[0]
    sums["jvp"] = jvp(of_parameters, (parameters,), ({k: v.cos() for k, v in parameters.items()},))[1]
    sums["second"] = grad(lambda p: sum(g.pow(3).sum() for g in grad(of_parameters)(p).values()))(parameters)
    joined = {"dx": grad(lambda x: of_input(x).sum())(x), "jvp": jvp(of_input, (x,), (tangent,))[1]}
    with forward_ad.dual_level():
        joined["dual"] = forward_ad.unpack_dual(of_input(forward_ad.make_dual(x, tangent))).tangent
    return sums, joined


def func_rank(rank, world_size):
    part = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    sums, joined = transformed(syncbn.convert(net()), whole()[part], whole().sin()[part])
    del sums["second"]  # of a sum over ranks: see test_second_order_by_torch_func
    return sums, joined


def test_torch_func_equals_one_process(run):
    sums, joined = transformed(net(), whole(), whole().sin())
    results = run(func_rank, len(SIZES))
    for name in ("grad", "vjp"):
        for key, value in sums[name].items():
            torch.testing.assert_close(sum(r[0][name][key] for r in results), value, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(sum(r[0]["jvp"] for r in results), sums["jvp"], rtol=1e-9, atol=1e-11)
    for name, value in joined.items():
        torch.testing.assert_close(torch.cat([r[1][name] for r in results]), value, rtol=1e-9, atol=1e-11)


def jacobians(rank, world_size):
    """Of y by the weight: of a rank's outputs, without communication between the columns that would miss."""
    x = whole()[sum(SIZES[:rank]) : sum(SIZES[: rank + 1])]

    def of_weight(w):
        return sync_batch_norm(x, None, None, w, None, True).square()

    weight = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    return jacrev(of_weight)(weight), jacfwd(of_weight)(weight), hessian(of_weight)(weight)


def test_jacobians_by_the_weight(run):
    weight, x = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), whole()

    def of_weight(w):
        return torch.nn.functional.batch_norm(x, None, None, w, None, True).square()

    expected = jacrev(of_weight)(weight), jacfwd(of_weight)(weight), hessian(of_weight)(weight)
    for results, value in zip(zip(*run(jacobians, len(SIZES)), strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(results), value)


def mapped(rank, world_size):
    """Three models' losses at once: the sums of all of them travel in one exchange."""
    x = whole()[sum(SIZES[:rank]) : sum(SIZES[: rank + 1])]
    weights = torch.arange(1.0, 10.0, dtype=torch.float64).view(3, 3)
    return vmap(grad(lambda w: (sync_batch_norm(x * w, None, None, w, None, True) ** 3).sum()))(weights)


def test_vmap_over_models(run):
    weights = torch.arange(1.0, 10.0, dtype=torch.float64).view(3, 3)
    x, norm = whole(), torch.nn.functional.batch_norm
    expected = vmap(grad(lambda w: (norm(x * w, None, None, w, None, True) ** 3).sum()))(weights)
    torch.testing.assert_close(sum(run(mapped, len(SIZES))), expected)


def moved(model, x):
    """Buffers that are made within the transform, as torch wants it, and returned."""
    parameters = {k: p.detach() for k, p in model.named_parameters()}

    def loss(p):
        buffers = {k: b.clone() for k, b in model.named_buffers()}
        return functional_call(model, (p, buffers), (x,)).square().sum(), buffers

    return grad(loss, has_aux=True)(parameters)[1]


def statistics_rank(rank, world_size):
    return moved(syncbn.convert(net()), whole()[sum(SIZES[:rank]) : sum(SIZES[: rank + 1])])


def test_running_statistics_move_within_a_transform(run):
    for buffers in run(statistics_rank, len(SIZES)):
        torch.testing.assert_close(buffers, moved(net(), whole()))


def test_one_process():
    model = net()
    expected = transformed(copy.deepcopy(model), whole(), whole().cos())
    actual = transformed(syncbn.convert(model), whole(), whole().cos())
    torch.testing.assert_close(actual, expected)
