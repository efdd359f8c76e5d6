"""frn, evonorm_s0 and evonorm_b0: each against timm and its formula, on ranks too, and in place of an activation."""

import copy
import pickle

import pytest
import torch
from ranks import device
from torch import nn

import syncbn
from syncbn.nn.evonorm_b0 import EvoNormB0
from syncbn.nn.evonorm_s0 import EvoNormS0
from syncbn.nn.frn import FilterResponseNorm

NORMS = {  # class, options, and what it adds
    "frn": (FilterResponseNorm, {"eps": 1e-5}, "tau"),
    "evonorm_s0": (EvoNormS0, {"num_groups": 3}, "v"),
    "evonorm_b0": (EvoNormB0, {}, "v"),
}
SHAPES = [(4, 6), (4, 6, 5), (4, 6, 5, 3), (4, 6, 1, 1), (2, 6, 2, 3, 2)]


def layer_of(norm, dtype=torch.float64, **options):
    """The layer with its activation; every parameter differs from its start value."""
    cls, defaults, _ = NORMS[norm]
    layer = cls(nn.BatchNorm2d(6, dtype=dtype), **defaults | options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in layer.parameters():
            value += torch.randn(value.shape, generator=generator).to(dtype) / 2
    return layer


def witness_of(norm, layer):
    """timm's layer with the state of ours, which must be all it has."""
    from timm.layers import EvoNorm2dB0, EvoNorm2dS0, FilterResponseNormTlu2d

    makers = {
        "frn": lambda on: FilterResponseNormTlu2d(6, on),
        "evonorm_s0": lambda on: EvoNorm2dS0(6, 3, apply_act=on),
        "evonorm_b0": lambda on: EvoNorm2dB0(6, on),
    }
    witness = makers[norm](getattr(layer, NORMS[norm][2]) is not None).double()
    if norm.startswith("evonorm"):
        witness.float = None  # not used; timm computes statistics in float32
    witness.load_state_dict(layer.state_dict())
    return witness


def formula(norm, layer, x, var=None):
    """The equation in the dtype of x, by other operators; ``var`` instead of that of the batch."""
    flat, added = x.reshape(*x.shape[:2], -1), getattr(layer, NORMS[norm][2])[None, :, None]
    weight, bias = layer.weight[None, :, None], layer.bias[None, :, None]
    if norm == "frn":
        y = torch.max(flat * flat.pow(2).mean(2, keepdim=True).add(layer.eps).pow(-0.5) * weight + bias, added)
    elif norm == "evonorm_s0":
        groups = flat.reshape(len(x), 3, -1).var(2, correction=0).repeat_interleave(2, 1)[..., None]
        y = flat / (1 + torch.exp(-added * flat)) / (groups + layer.eps).sqrt() * weight + bias
    else:
        var = flat.transpose(0, 1).reshape(6, -1).var(1, correction=0) if var is None else var
        own = flat.var(2, correction=0, keepdim=True)
        below = torch.stack([(var[None, :, None] + 1e-3).sqrt().expand_as(flat), added * flat + (own + 1e-3).sqrt()])
        y = flat / below.amax(0) * weight + bias
    return y.reshape(x.shape)


def inputs(*shape, seed=2, dtype=torch.float64):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 0.5
    return x.to(dtype).requires_grad_(), torch.randn(shape, generator=torch.Generator().manual_seed(seed + 100)).to(dtype)


def step(module, x, dy):
    """Output and gradients; the latter of a random weighing of the former."""
    y = module(x)
    return [y, *torch.autograd.grad((y * dy).sum(), [x, *layer_parameters(module)], allow_unused=True)]


def layer_parameters(module):
    return [] if not isinstance(module, nn.Module) else [p for _, p in sorted(module.named_parameters())]


class InDouble(torch.overrides.TorchFunctionMode):
    """Let ``x.float()``, in which timm computes statistics, leave float64 as it is."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        is_float64 = function is torch.Tensor.float and args[0].dtype == torch.float64
        return args[0] if is_float64 else function(*args, **kwargs or {})


@pytest.mark.parametrize("activate", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_equal_to_timm(norm, activate):
    layer = layer_of(norm)
    if not activate:
        layer.remove_activation()
    witness = witness_of(norm, layer)
    for training, seed, shape in ((True, 1, (4, 6, 5, 3)), (True, 2, (3, 6, 1, 2)), (False, 3, (2, 6, 3, 3))):
        x, dy = inputs(*shape, seed=seed)
        with InDouble():
            wanted = step(witness.train(training), x, dy)
        torch.testing.assert_close(step(layer.train(training), x, dy), wanted, rtol=1e-11, atol=1e-11)
    assert list(layer.state_dict()) == list(witness.state_dict())
    torch.testing.assert_close(layer.state_dict(), witness.state_dict(), rtol=1e-12, atol=1e-12)
    layer.load_state_dict(witness.state_dict())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", NORMS)
def test_equal_to_the_formula_in_all_dimensions(norm, shape):
    layer, (x, dy) = layer_of(norm), inputs(*shape)
    wanted = formula(norm, layer, x)
    wanted = [wanted, *torch.autograd.grad((wanted * dy).sum(), [x, *layer_parameters(layer)])]
    torch.testing.assert_close(step(layer, x, dy), wanted, rtol=1e-11, atol=1e-11)
    single = layer_of(norm, torch.float32)
    y = single(x.float())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), formula(norm, layer, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", NORMS)
def test_half_inputs_are_computed_in_float32(norm, dtype):
    layer, (x, _) = layer_of(norm, torch.float32), inputs(4, 6, 5, 3, dtype=dtype)
    wanted = formula(norm, layer, x.float())
    for module in (layer, copy.deepcopy(layer).to(dtype)):
        y = module(x)
        assert y.dtype == dtype
        rounding = torch.finfo(dtype).eps * (1 if module is layer else 8)  # the parameters round too
        torch.testing.assert_close(y.float(), wanted, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("norm", NORMS)
def test_second_order_memory_format_and_errors(norm):
    layer = layer_of(norm)
    x, _ = inputs(2, 6, 2, 1)
    assert torch.autograd.gradgradcheck(lambda x, *_: layer(x), (x, *layer_parameters(layer)))
    last = inputs(2, 6, 4, 3)[0].to(memory_format=torch.channels_last)
    assert layer(last).is_contiguous(memory_format=torch.channels_last)
    assert layer(torch.empty(0, 6, 2, 2, dtype=torch.float64)).shape == (0, 6, 2, 2)
    with pytest.raises(ValueError, match=r"expected an input of 6 channels \(N, C, \*\), got 5"):
        layer(x[:, :5])


def test_a_learned_eps_of_frn():
    layer, (x, dy) = layer_of("frn", eps=1e-4, learn_eps=True), inputs(4, 6, 1, 1)
    with torch.no_grad():
        layer.eps.fill_(-0.3)
    wanted = torch.max(x / (x**2 + 0.3).sqrt() * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1), layer.tau.view(-1, 1, 1))
    torch.testing.assert_close(layer(x), wanted)
    assert torch.autograd.grad((layer(x) * dy).sum(), layer.eps)[0] != 0
    assert list(layer.state_dict()) == ["weight", "bias", "tau", "eps"]


def test_b0_refuses_what_it_cannot_do():
    layer = layer_of("evonorm_b0")
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        layer(inputs(1, 6, 1, 1)[0])
    with pytest.raises(ValueError, match="expected no mask"):
        layer(inputs(4, 6)[0], torch.ones(4, 1, dtype=torch.bool))


def joined_step(rank, splits, process_group):
    """Two steps of B0 on this rank's part, the second with a penalty of the input's gradient; and an evaluation."""
    layer = syncbn.convert(nn.Sequential(layer_before(), nn.ReLU()), "evonorm_b0", process_group=process_group)[0]
    state, parts = layer_of("evonorm_b0").state_dict(), []
    layer.load_state_dict(state)
    layer.to(device())
    for seed in (1, 2):
        x, dy = (torch.split(t.detach(), splits)[rank].to(device()) for t in inputs(sum(splits), 6, 3, 2, seed=seed))
        x.requires_grad_()
        y = layer(x)
        [dx] = torch.autograd.grad((y * dy).sum(), x, create_graph=True)
        grads = torch.autograd.grad((y * dy).sum() + (dx**3).sum(), [x, *layer_parameters(layer)])
        parts.append([t.detach().cpu() for t in (y, dx, *grads)])
    with torch.no_grad():
        parts.append([layer.eval()(x).cpu(), layer.running_var.cpu()])
    return parts


def layer_before():
    return nn.BatchNorm2d(6, dtype=torch.float64)


def on_ranks(rank, world_size, splits, process_group=None):
    return joined_step(rank, splits, process_group)


@pytest.mark.parametrize("splits", [(2, 1), (3, 0, 2), (1, 1, 0, 3)])
def test_b0_on_ranks_equals_timm_on_the_joined_batch(run, splits):
    from timm.layers import EvoNorm2dB0

    witness, results = EvoNorm2dB0(6).double(), run(on_ranks, len(splits), splits)
    witness.load_state_dict(layer_of("evonorm_b0").state_dict())
    for index, seed in enumerate((1, 2)):
        x, dy = inputs(sum(splits), 6, 3, 2, seed=seed)
        with InDouble():
            y = witness(x)
        [dx] = torch.autograd.grad((y * dy).sum(), x, create_graph=True)
        wanted = [y, dx, *torch.autograd.grad((y * dy).sum() + (dx**3).sum(), [x, *layer_parameters(witness)])]
        got = list(zip(*(result[index] for result in results), strict=True))
        got = [torch.cat(parts) for parts in got[:3]] + [sum(parts) for parts in got[3:]]
        torch.testing.assert_close(got, [w.detach() for w in wanted], rtol=1e-10, atol=1e-10)
    for y, running_var in (result[2] for result in results):
        torch.testing.assert_close(running_var, witness.running_var, rtol=1e-12, atol=1e-12)
        assert y.shape[1:] == (6, 3, 2)
    torch.testing.assert_close(torch.cat([result[2][0] for result in results]), witness.eval()(x), rtol=1e-11, atol=1e-11)


def test_b0_in_groups_of_ranks(run):
    in_pairs = run(on_ranks, 4, (2, 1, 3, 2), 2)
    alone = run(on_ranks, 2, (2, 1))
    for a, b in zip(in_pairs[:2], alone, strict=True):
        torch.testing.assert_close(a[0][0].shape, b[0][0].shape)
    x = torch.cat([inputs(8, 6, 3, 2, seed=1)[0][3:]])
    y = torch.cat([in_pairs[2][0][0], in_pairs[3][0][0]])
    torch.testing.assert_close(y, formula("evonorm_b0", layer_of("evonorm_b0"), x).detach(), rtol=1e-11, atol=1e-11)
