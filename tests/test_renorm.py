"""Batch renormalization over ranks: against its formula on the joined batch, BatchNorm, eval mode and Keras."""

import copy
import warnings
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import syncbn

C, EPS = 3, 0.01
KEEPS = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")  # not torch 2.6: r and d of a first pass
WORDS = {"r_max": 1.5, "d_max": 0.4, "warmup_steps": 1, "r_ramp_steps": 2, "d_ramp_steps": 1}
FULL = {"warmup_steps": 0, "r_ramp_steps": 0, "d_ramp_steps": 0}  # full limits from the first batch on
SPLITS = {
    "uneven": [(2, C, 2, 2), (1, C, 2, 2), (4, C, 2, 2)],
    "empty": [(3, C, 5), (0, C, 5), (1, C, 2)],
    "one": [(5, C, 3)],
    "flat": [(3, C), (1, C)],
    "four": [(1, C, 1, 1, 3), (0, C, 1, 1, 3), (2, C, 1, 1, 3), (0, C, 1, 1, 3)],
}


def make(**options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "warmup_steps=0")
        layer = syncbn.BatchRenorm(C, **{"eps": EPS, "momentum": 0.3, "dtype": torch.float64, **WORDS, **options})
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for value in layer.parameters():
            value.copy_(torch.randn(C, generator=generator) + 1)
    return layer


def draw(shapes, steps=5, seed=0):
    """Inputs and output weights by step and rank; mean and spread move from step to step."""
    generator = torch.Generator().manual_seed(seed)
    spread = [0.5, 1.0, 3.0, 1.0, 0.5, 2.0]
    draws = [[torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in shapes] for _ in spread]
    xs = [[part[0] * spread[step] + step % 3 for part in draws[step]] for step in range(steps)]
    return xs, [[part[1] for part in draws[step]] for step in range(steps)]


def rows(parts):
    """The values of all ranks, (n, C)."""
    return torch.cat([part.detach().double().movedim(1, -1).flatten(0, -2) for part in parts])


def limits_at(step, words):
    def part(ramp):
        since = step - words["warmup_steps"]
        return min(max(since / ramp, 0), 1) if ramp else float(since >= 0)

    return 1 + (words["r_max"] - 1) * part(words["r_ramp_steps"]), words["d_max"] * part(words["d_ramp_steps"])


def truth(xs, dys, layer, momentum=0.3):
    """Algorithm 1 on the joined batch of each step, by other operators; and how often r and d were clipped."""
    old_mean, old_std = torch.zeros(C).double(), (torch.ones(C).double() + EPS) ** 0.5
    steps, clipped = [], torch.zeros(2, dtype=torch.int64)
    for step, (x, dy) in enumerate(zip(map(rows, xs), map(rows, dys), strict=True)):
        x.requires_grad_()
        var, mean = torch.var_mean(x, 0, correction=0)
        std = (var + EPS) ** 0.5
        r_max, d_max = limits_at(step, WORDS)
        r, d = (std / old_std).detach(), ((mean - old_mean) / old_std).detach()
        clipped += torch.stack([((r > r_max) | (r < 1 / r_max)).sum(), (d.abs() > d_max).sum()])
        y = ((x - mean) / std * r.clip(1 / r_max, r_max) + d.clip(-d_max, d_max)) * layer.weight + layer.bias
        gradients = torch.autograd.grad((y * dy).sum(), (x, layer.weight, layer.bias))
        factor = 1 / (step + 1) if momentum is None else momentum
        old_mean = old_mean + factor * (mean.detach() - old_mean)
        old_std = old_std + factor * (std.detach() - old_std)
        steps.append((y.detach(), *gradients, old_mean, old_std**2 - EPS))
    return steps, clipped


def train(layer, xs, dys):
    """One rank's part; returns y, dx, the gradients of weight and bias, and both statistics of each step."""
    steps = []
    for x, dy in zip(xs, dys, strict=True):
        x = x.clone().requires_grad_()
        y = layer(x)
        gradients = torch.autograd.grad((y * dy.to(y.dtype)).sum(), (x, layer.weight, layer.bias))
        steps.append((y.detach(), *gradients, layer.running_mean.clone(), layer.running_var.clone()))
    return steps


def train_rank(rank, world_size, xs, dys, options):
    dtype = options.get("dtype", torch.float64)
    return train(make(**options), [parts[rank].to(dtype) for parts in xs], [parts[rank] for parts in dys])


def check(results, expected, tol, num_summed=2):
    """Compare the ranks with the joined batch, relative to the largest number of each tensor.

    A step is y, dx, the gradients of parameters, which add up over the ranks, and running statistics, equal on all.
    """
    for step, (y, dx, *rest) in enumerate(expected):
        parts = [result[step] for result in results]
        joined = [rows([part[0] for part in parts]), rows([part[1] for part in parts])]
        joined += [sum(part[2 + i].double() for part in parts) for i in range(num_summed)]
        joined += [torch.stack([part[2 + num_summed + i].double() for part in parts]) for i in range(2)]
        for actual, wanted in zip(joined, (y, dx, *rest), strict=True):
            scale = max(1, float(wanted.abs().max()))
            torch.testing.assert_close(actual, wanted.expand_as(actual), rtol=0, atol=tol * scale)


@pytest.mark.parametrize(
    ("split", "options", "tol"),
    [(split, {}, 1e-12) for split in SPLITS]
    + [("uneven", {"momentum": None}, 1e-12), ("uneven", {"dtype": torch.float32}, 2e-6)],
)
def test_the_formula_on_the_joined_batch(run, split, options, tol):
    xs, dys = draw(SPLITS[split])
    expected, clipped = truth(xs, dys, make(), options.get("momentum", 0.3))
    assert (clipped >= 2).all()  # both limits are at work, and not always
    assert clipped.sum() < 2 * C * len(xs)
    check(run(train_rank, len(SPLITS[split]), xs, dys, options), expected, tol)


def test_limits_of_1_and_0_are_batchnorm(run):
    xs, dys = draw(SPLITS["uneven"])
    limits = {"r_max": 1, "d_max": 0, **FULL}
    reference = nn.BatchNorm1d(C, EPS, 0.3, dtype=torch.float64)
    reference.load_state_dict(make().state_dict())
    results = run(train_rank, 3, xs, dys, limits)
    wanted = train(reference, list(map(rows, xs)), list(map(rows, dys)))
    unbiased = [results[0][step][5] for step in range(len(xs))]  # running_var alone differs: it is of sqrt(var + eps)
    check(results, [(*step[:5], var) for step, var in zip(wanted, unbiased, strict=True)], 1e-12)


def test_without_limits_it_is_eval_mode_with_the_statistics_of_before():
    layer = make(r_max=float("inf"), d_max=float("inf"), **FULL)
    for x in [parts[0] for parts in draw(SPLITS["one"])[0]]:
        before = copy.deepcopy(layer).eval()(x)
        torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_constant_input_and_a_large_mean(dtype):
    layer = make(dtype=torch.float32 if dtype == torch.bfloat16 else dtype, eps=1e-8, momentum=0.9, **FULL)
    x = torch.full((4, C, 5), 3.0, dtype=dtype, requires_grad=True)
    for _ in range(30):
        y = layer(x)
        (y * torch.linspace(0, 1, 60).view(4, C, 5)).sum().backward()
        assert y.dtype == dtype
        assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert (layer.running_var >= 0).all()
    assert layer.eval()(x).isfinite().all()
    if dtype == torch.float32:
        x = torch.randn(64, C, 9, generator=torch.Generator().manual_seed(0)) + 1e4
        expected = x.double() - x.double().mean((0, 2), keepdim=True)
        expected /= (expected.square().mean((0, 2), keepdim=True) + 1e-8).sqrt()
        y = make(dtype=dtype, eps=1e-8, r_max=1, d_max=0, affine=False)(x)
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=5e-6)


def test_the_limits_follow_the_clock():
    for words in (WORDS, FULL, {"warmup_steps": 3, "r_ramp_steps": 0, "d_ramp_steps": 4}):
        layer = make(**words)
        for step in range(9):
            torch.testing.assert_close([t.item() for t in layer.limits()], [*limits_at(step, {**WORDS, **words})])
            layer(torch.randn(2, C, 2).double())
    layer = syncbn.BatchRenorm(C)  # the paper's
    for step, wanted in ((5_000, (1, 0)), (25_000, (1 + 2 * 20 / 35, 5)), (40_000, (3, 5)), (10**6, (3, 5))):
        layer.num_batches_tracked.fill_(step)
        assert [t.item() for t in layer.limits()] == pytest.approx(wanted)


def test_precise_statistics_are_those_of_batchnorm():
    """Batches normalize by themselves meanwhile, whatever the statistics of before, and where the clock stands."""
    xs = [torch.randn(6, C, 5, dtype=torch.float64) for _ in range(3)]
    layer, plain = make(**FULL), nn.BatchNorm1d(C, EPS, dtype=torch.float64)
    layer.num_batches_tracked.fill_(10**6)
    plain.load_state_dict(layer.state_dict())
    found = []
    for first in (layer, plain):
        model = nn.Sequential(first, nn.ReLU(), nn.BatchNorm1d(C, dtype=torch.float64))
        found.append(syncbn.update_bn_stats(model, xs).state_dict())
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def empty_rank(rank, world_size):
    """No value on any rank: only the clock moves; one value: an error on all, and nothing moves."""
    layer = make(momentum=None)
    before = copy.deepcopy(layer.state_dict())
    x = torch.empty(0, C, 2, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    assert before.pop("num_batches_tracked") + 1 == layer.num_batches_tracked
    torch.testing.assert_close({k: layer.state_dict()[k] for k in before}, before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="more than 1 value per channel when training, got 1 over all ranks"):
        layer(torch.zeros(rank, C, 1, dtype=torch.float64))
    return layer.num_batches_tracked.item()


def test_no_value_and_one_value(run):
    assert run(empty_rank, 2) == [1, 1]


def masked_rank(rank, world_size, xs, masks):
    layer = make(**FULL)
    return [layer(x[rank], masks[rank]).detach() for x in xs], layer.running_mean, layer.running_var


def test_a_mask_leaves_padding_out(run):
    xs, _ = draw([(3, C, 4), (2, C, 3)], steps=2)
    masks = [torch.arange(12).view(3, 1, 4) % 3 > 0, torch.arange(6).view(2, 1, 3) % 4 > 1]
    valid = [[x.movedim(1, -1)[m[:, 0]] for x, m in zip(step, masks, strict=True)] for step in xs]
    layer = make(**FULL)
    wanted = [layer(torch.cat(step)) for step in valid]
    results = run(masked_rank, 2, xs, masks)
    for step, y in enumerate(wanted):
        picked = [r[0][step].movedim(1, -1)[m[:, 0]] for r, m in zip(results, masks, strict=True)]
        torch.testing.assert_close(torch.cat(picked), y, rtol=1e-12, atol=1e-12)
        assert all((r[0][step] * ~m == 0).all() for r, m in zip(results, masks, strict=True))
    for result in results:
        torch.testing.assert_close(result[1:], (layer.running_mean, layer.running_var), rtol=1e-12, atol=1e-12)


def twice_differentiable_rank(rank, world_size):
    """Each call starts from the same statistics, so that r and d differ by what the input does, but have no gradient.

    Where both are clipped they are constants, as gradgradcheck wants it.
    """
    generator = torch.Generator().manual_seed(rank)
    x = (torch.randn(2 + rank, C, 2, generator=generator, dtype=torch.float64) * 9 + 5).requires_grad_()
    layer = make(**FULL)
    state = copy.deepcopy(layer.state_dict())

    def normalize(x, weight, bias):
        values = {**state, "weight": weight, "bias": bias}
        return torch.func.functional_call(layer, {k: v.clone() for k, v in values.items()}, (x,))

    arguments = x, layer.weight, layer.bias
    if world_size == 1:
        assert torch.autograd.gradcheck(normalize, arguments)
        assert torch.autograd.gradgradcheck(normalize, arguments)
    dx = torch.autograd.grad((normalize(*arguments) ** 3).sum(), x, create_graph=True)[0]
    return x.detach(), torch.autograd.grad((dx**2).sum(), x)[0]


def test_a_second_backward(run):
    run(twice_differentiable_rank, 1, initialize=False)
    results = run(twice_differentiable_rank, 2)
    x = rows([x for x, _ in results]).requires_grad_()
    layer = make(**FULL)
    dx = torch.autograd.grad((layer(x) ** 3).sum(), x, create_graph=True)[0]
    torch.testing.assert_close(
        rows([dd for _, dd in results]), torch.autograd.grad((dx**2).sum(), x)[0], rtol=1e-9, atol=1e-9
    )


def net():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, C), nn.BatchNorm1d(C)]
    return syncbn.convert(nn.Sequential(*layers).double(), "brn", include=["4"], momentum=0.3, **WORDS)


def checkpointed_rank(rank, world_size, how):
    """A SyncBatchNorm and a BatchRenorm in one region: what is kept for one must not reach the other."""
    model = syncbn.convert(net(), include=["1"])
    if how is True or (how is False and not KEEPS):
        x = torch.randn(3, 4, dtype=torch.float64).requires_grad_()
        with pytest.raises(ValueError, match="use_reentrant=False"):
            checkpoint(model, x, use_reentrant=how).square().sum().backward()
        return None
    states = []
    for step in range(4):
        generator = torch.Generator().manual_seed(10 * step + rank)
        x = (torch.randn(3, 4, dtype=torch.float64, generator=generator) * (step + 1)).requires_grad_()
        y = model(x) if how is None else checkpoint(model, x, use_reentrant=how)
        z = model(x + 1) if how is None else checkpoint(model, x + 1, use_reentrant=how)
        ((y**3).sum() + (z**2).sum()).backward()
        states.append([x.grad, *(p.grad.clone() for p in model.parameters()), *(b.clone() for b in model.buffers())])
    return states


@pytest.mark.parametrize("world_size", [1, 2])
def test_activation_checkpointing_keeps_r_and_d_of_the_first_pass(run, world_size):
    run(checkpointed_rank, world_size, True)
    states = run(checkpointed_rank, world_size, False)
    if KEEPS:
        torch.testing.assert_close(states, run(checkpointed_rank, world_size, None), rtol=1e-10, atol=1e-12)


def compiled_rank(rank, world_size, xs, dys):
    import torch._dynamo

    torch._dynamo.reset()
    layer = make()
    other = copy.deepcopy(layer)
    graph = torch.compile(layer, backend="aot_eager", fullgraph=True)
    mine, eager = ([parts[rank] for parts in t] for t in (xs, dys)), None
    mine, dy = mine
    eager = train(other, mine, dy)
    steps = []
    with torch._dynamo.config.patch(error_on_recompile=True):  # the step must not be a constant of the graph
        for x, g in zip(mine, dy, strict=True):
            x = x.clone().requires_grad_()
            y = graph(x)
            gradients = torch.autograd.grad((y * g).sum(), (x, layer.weight, layer.bias))
            steps.append((y.detach(), *gradients, layer.running_mean.clone(), layer.running_var.clone()))
    torch.testing.assert_close(steps, eager, rtol=1e-11, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_compile_without_recompilation(run, world_size):
    shapes = [(2 + rank, C, 2, 2) for rank in range(world_size)]
    run(compiled_rank, world_size, *draw(shapes), timeout=240)


def witness(split, dtype, clip):
    """The job of Keras for a case, on the joined batch; it has no schedule, so its limits are the full ones."""
    xs, dys = ([torch.cat(parts).to(dtype).numpy() for parts in t] for t in draw(SPLITS[split]))
    start = (torch.ones(C).double() + EPS).sqrt().numpy()  # of running_var = 1
    layer = make(dtype=dtype, **FULL)
    weights = {"gamma": layer.weight.detach().numpy(), "beta": layer.bias.detach().numpy()}
    weights |= {"renorm_stddev": start, "moving_stddev": start}
    words = {"axis": 1, "epsilon": EPS, "momentum": 0.7, "renorm_momentum": 0.7, "renorm": True, "weights": weights}
    words["renorm_clipping"] = {"rmax": clip["r_max"], "rmin": 1 / clip["r_max"], "dmax": clip["d_max"]}
    return dict(xs=xs, dys=dys, float64=dtype == torch.float64, **words)


def steps_of(answer):
    """Keras' answer in the form that `check` takes; its statistics are the mean and the standard deviation."""
    steps = []
    for y, dx, gradients, variables in zip(*(answer[k] for k in ("y", "dx", "gradients", "variables")), strict=True):
        numbers = (
            gradients["gamma"],
            gradients["beta"],
            variables["renorm_mean"],
            variables["renorm_stddev"] ** 2 - EPS,
        )
        steps.append(
            [rows([torch.from_numpy(array)]) for array in (y, dx)] + [torch.tensor(n).double() for n in numbers]
        )
    return steps


@pytest.mark.slow
@pytest.mark.skipif(find_spec("keras") is None, reason="keras is not installed")
def test_keras_on_the_joined_batch(run):
    from witnesses import ask

    clips = [{"r_max": 1.5, "d_max": 0.4}, {"r_max": 3.0, "d_max": 5.0}, {"r_max": 1.0, "d_max": 0.0}]
    splits = ("uneven", "one", "flat", "four")
    cases = [(split, dtype, clip) for split in splits for dtype in (torch.float64, torch.float32) for clip in clips]
    for (split, dtype, clip), answer in zip(cases, ask("keras_witness.py", [witness(*c) for c in cases]), strict=True):
        xs, dys = draw(SPLITS[split])
        results = run(train_rank, len(SPLITS[split]), xs, dys, {"dtype": dtype, **FULL, **clip})
        check(results, steps_of(answer), 1e-9 if dtype == torch.float64 else 2e-6)
