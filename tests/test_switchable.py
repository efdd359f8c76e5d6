"""Switchable normalization over ranks: its formula on the joined batch, the three norms it mixes, and their keys."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_renorm import check, rows
from torch import nn
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.nn.switchable import shares_of

C, EPS = 4, 0.01
SPLITS = {
    "uneven": [(2, C, 2, 3), (1, C, 2, 3), (4, C, 2, 3)],
    "empty": [(3, C, 5), (0, C, 5), (2, C, 2)],
    "flat": [(3, C), (1, C)],
    "one value each": [(1, C, 1, 1), (2, C, 1, 1)],
    "no positions": [(2, C, 0), (2, C, 3)],
    "four": [(1, C, 2, 1, 3), (0, C, 2, 1, 3), (2, C, 2, 1, 3), (0, C, 2, 1, 3)],
}
NAMES = ("weight", "bias", "mean_weight", "var_weight")


def make(**options):
    layer = syncbn.SwitchableNorm(C, **{"eps": EPS, "momentum": 0.3, "dtype": torch.float64, **options})
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for value in layer.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) + 1)
    return layer


def draw(shapes, steps=2, seed=0):
    """Inputs and output weights by step and rank, samples and channels of different means and spreads."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in shapes * steps]
    xs = [
        d[0] * torch.rand(d[0].shape[:2], generator=generator).view(d[0].shape[:2] + (1,) * (d.dim() - 3))
        for d in draws
    ]
    xs = [x + torch.arange(C).view(-1, *[1] * (x.dim() - 2)) for x in xs]
    n = len(shapes)
    return [xs[i * n : (i + 1) * n] for i in range(steps)], [
        [d[1] for d in draws[i * n : (i + 1) * n]] for i in range(steps)
    ]


def formula(parts, weight, bias, mean_weight, var_weight, running=None):
    """The equation, sample by sample; ``running``: mean and variance of BN, in place of those of all samples."""
    flat = parts[0].dim() == 2
    joined = torch.cat([x.movedim(1, -1).flatten(0, -2) for x in parts])
    mean_bn, var_bn = (joined.mean(0), joined.var(0, correction=0)) if running is None else running
    p, q = ((w[1:] if flat else w).softmax(0) for w in (mean_weight, var_weight))
    outputs = []
    for x in parts:
        samples = []
        for sample in x:
            values = sample.reshape(C, -1)
            if not values.numel():
                samples.append(sample)
                continue
            m_in, v_in = values.mean(1), values.var(1, correction=0)
            means, variances = (
                [m_in, values.mean().expand(C), mean_bn],
                [v_in, values.var(correction=0).expand(C), var_bn],
            )
            mean = sum(share * m for share, m in zip(p, means[flat:], strict=True))
            var = sum(share * v for share, v in zip(q, variances[flat:], strict=True))
            y = (values - mean[:, None]) / (var + EPS)[:, None] ** 0.5
            samples.append((y * weight[:, None] + bias[:, None]).view(sample.shape))
        outputs.append(torch.stack(samples) if samples else x)
    return outputs


def truth(xs, dys, layer):
    """Outputs, gradients and running statistics of each step."""
    parameters = [getattr(layer, name) for name in NAMES]
    statistics = nn.BatchNorm1d(C, momentum=layer.momentum, dtype=torch.float64)
    steps = []
    for x, dy in zip(xs, dys, strict=True):
        x = [part.clone().requires_grad_() for part in x]
        y = formula(x, *parameters)
        loss = sum((a * b).sum() for a, b in zip(y, dy, strict=True))
        gradients = torch.autograd.grad(loss, [*x, *parameters], materialize_grads=True, allow_unused=True)
        statistics(rows(x))
        running = statistics.running_mean.clone(), statistics.running_var.clone()
        steps.append((rows(y), rows(gradients[: len(x)]), *gradients[len(x) :], *running))
    return steps


def train_rank(rank, world_size, xs, dys, options):
    layer, steps = make(**options), []
    for parts, dy in zip(xs, dys, strict=True):
        x = parts[rank].to(layer.weight.dtype).requires_grad_()
        y = layer(x)
        gradients = torch.autograd.grad((y * dy[rank]).sum(), [x, *(getattr(layer, name) for name in NAMES)])
        steps.append((y.detach(), *gradients, layer.running_mean.clone(), layer.running_var.clone()))
    return steps


@pytest.mark.parametrize(
    ("split", "options", "tol"),
    [(split, {}, 1e-12) for split in SPLITS]
    + [("uneven", {"momentum": None}, 1e-12), ("uneven", {"dtype": torch.float32}, 2e-6)],
)
def test_the_formula_on_the_joined_batch(run, split, options, tol):
    xs, dys = draw(SPLITS[split])
    expected = truth(xs, dys, make(**{**options, "dtype": torch.float64}))
    check(run(train_rank, len(SPLITS[split]), xs, dys, options), expected, tol, num_summed=4)


def one_hot(kind, **options):
    layer = make(**options)
    with torch.no_grad():
        for weight in (layer.mean_weight, layer.var_weight):
            weight.fill_(-1e3)[("IN", "LN", "BN").index(kind)] = 1e3
    return layer


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(5, C), (5, C, 3), (3, C, 2, 3), (2, C, 2, 1, 3)], ids=str)
def test_one_hot_weights_are_the_three_norms(shape, mode):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 1
    for kind in ("IN", "LN", "BN")[len(shape) == 2 :]:
        layer = one_hot(kind)
        reference = nn.BatchNorm1d(C, EPS, 0.3, dtype=torch.float64)
        reference.load_state_dict(layer.state_dict(), strict=False)
        for module in (layer, reference):
            module.running_var.mul_(2).add_(0.1)
            module.running_mean.add_(0.5)
        batchnorm = lambda x: reference.train(mode)(x.flatten(2) if x.dim() > 2 else x).view_as(x)  # noqa: B023, E731
        wanted = {
            "IN": lambda x: F.instance_norm(x, weight=layer.weight, bias=layer.bias, eps=EPS),  # noqa: B023
            "LN": lambda x: F.group_norm(x, 1, layer.weight, layer.bias, EPS),  # noqa: B023
            "BN": batchnorm,
        }[kind](x)
        torch.testing.assert_close(layer.train(mode)(x), wanted, rtol=1e-12, atol=1e-12)
        if kind == "BN":
            torch.testing.assert_close(layer.running_var, reference.running_var)


def test_eval_mode_mixes_the_running_statistics():
    layer, x = make(), draw(SPLITS["uneven"])[0][0][0]
    layer(x)
    parameters = [getattr(layer, name) for name in NAMES]
    wanted = formula([x], *parameters, running=(layer.running_mean, layer.running_var))[0]
    torch.testing.assert_close(layer.eval()(x), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x[:1]), wanted[:1], rtol=1e-12, atol=1e-12)
    assert layer(torch.randn(1, C, 1, 1).double()).isfinite().all()  # one value is enough here
    without = make(track_running_stats=False).eval()  # by the batch, as nn.BatchNorm
    torch.testing.assert_close(without(x), formula([x], *parameters)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_large_mean_and_half_types(dtype):
    offset = 1e4 if dtype == torch.float32 else 4
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(8, C, 5, 5, generator=generator) + offset * (1 + torch.arange(8.0).view(8, 1, 1, 1))).to(dtype)
    for kind in ("IN", "LN"):
        layer = one_hot(kind, dtype=torch.float32)
        y = layer(x)
        wanted = formula([x.double()], *(getattr(layer, name).double() for name in NAMES))[0]
        assert y.dtype == dtype
        tol = 2e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(y.double(), wanted, rtol=tol, atol=tol)
        assert layer.eval()(x).dtype == dtype


def test_second_derivatives():
    layer, x = make(), draw([(3, C, 2)])[0][0][0].requires_grad_()
    state = copy.deepcopy(layer.state_dict())

    def normalize(x, *parameters):
        values = {**{k: v.clone() for k, v in state.items()}, **dict(zip(NAMES, parameters, strict=True))}
        return torch.func.functional_call(layer, values, (x,))

    arguments = x, *(getattr(layer, name) for name in NAMES)
    assert torch.autograd.gradcheck(normalize, arguments)
    assert torch.autograd.gradgradcheck(normalize, arguments)


def second_rank(rank, world_size, xs):
    layer, x = make(), xs[rank].requires_grad_()
    dx = torch.autograd.grad((layer(x) ** 3).sum(), x, create_graph=True)[0]
    return torch.autograd.grad((dx**2).sum(), x)[0]


def test_a_second_backward_over_ranks(run):
    parts = draw(SPLITS["uneven"])[0][0]
    x = [part.clone().requires_grad_() for part in parts]
    y = formula(x, *(getattr(make(), name).detach() for name in NAMES))
    dx = torch.autograd.grad(sum((part**3).sum() for part in y), x, create_graph=True)
    wanted = torch.autograd.grad(sum((part**2).sum() for part in dx), x)
    torch.testing.assert_close(run(second_rank, 3, parts), list(wanted), rtol=1e-9, atol=1e-9)


def checkpointed_rank(rank, world_size, how):
    torch.manual_seed(0)
    model, states = nn.Sequential(nn.Conv1d(2, C, 1), make(dtype=torch.float32)).double(), []
    for _ in range(2):
        x = torch.randn(2, 2, 3, dtype=torch.float64).add(rank).requires_grad_()
        y = model(x) if how is None else checkpoint(model, x, use_reentrant=how)
        (y**3).sum().backward()
        states.append([x.grad, *(p.grad.clone() for p in model.parameters()), *(b.clone() for b in model.buffers())])
    return states


def test_activation_checkpointing(run):
    wanted = run(checkpointed_rank, 2, None)
    for how in (False, True):
        torch.testing.assert_close(run(checkpointed_rank, 2, how), wanted, rtol=1e-10, atol=1e-12)


def compiled_rank(rank, world_size, xs, dys):
    import torch._dynamo

    torch._dynamo.reset()
    layer, x, dy = make(), xs[rank], dys[rank]
    graph, other = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True), layer
    results = []
    for module in (graph, other):
        for _ in range(2):
            mine = x.clone().requires_grad_()
            y = module(mine)
            dx = torch.autograd.grad((y * dy).sum(), mine)[0]
        results.append((y.detach(), dx, module.running_mean, module.running_var, module.eval()(x).detach()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_compile(run, world_size):
    xs, dys = draw([(2 + rank, C, 2, 2) for rank in range(world_size)], 1)
    run(compiled_rank, world_size, xs[0], dys[0], timeout=240)


def test_released_checkpoints_load():
    """The authors' keys: no num_batches_tracked, and shapes of NCHW."""
    state = {"weight": (1, C, 1, 1), "bias": (1, C, 1, 1), "mean_weight": (3,), "var_weight": (3,)}
    state = {
        name: torch.rand(shape)
        for name, shape in {**state, "running_mean": (1, C, 1), "running_var": (1, C, 1)}.items()
    }
    model = nn.Sequential(nn.BatchNorm2d(C), nn.ReLU())
    syncbn.convert(model, "sn").load_state_dict({f"0.{name}": value for name, value in state.items()})
    for name, value in state.items():
        assert torch.equal(getattr(model[0], name), value.flatten())
    again = syncbn.SwitchableNorm(C)
    again.load_state_dict(model[0].state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        again.load_state_dict({**again.state_dict(), "weight": torch.ones(1, C + 1, 1, 1)})


def test_shares_per_layer():
    model = nn.Sequential(nn.Conv1d(2, C, 1), one_hot("LN"), nn.Flatten(), make(dtype=torch.float32)).float()
    model[3] = syncbn.SwitchableNorm(2 * C)
    model(torch.randn(3, 2, 2))
    assert shares_of(model) == {
        "1": {"mean": {"IN": 0, "LN": 1, "BN": 0}, "var": {"IN": 0, "LN": 1, "BN": 0}},
        "3": {"mean": {"LN": 0.5, "BN": 0.5}, "var": {"LN": 0.5, "BN": 0.5}},
    }


def test_no_mask_and_no_weight_decay():
    layer = make()
    with pytest.raises(ValueError, match="SwitchableNorm takes no mask"):
        layer(torch.randn(2, C, 3).double(), torch.ones(2, 1, 3))
    from experiment.training.task import Classifier  # takes seconds to import, which ranks need not

    task = Classifier(nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C)), C, weight_decay=0.1)
    syncbn.convert(task, "sn")
    task._trainer = SimpleNamespace(estimated_stepping_batches=10)
    decayed, rest = task.configure_optimizers()["optimizer"].param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0)
    assert decayed["params"] == [task.net[0].weight]
    assert {task.net[1].mean_weight, task.net[1].var_weight} <= set(rest["params"])
