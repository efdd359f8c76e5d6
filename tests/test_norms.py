"""The other arms: each norm against an independent reference, the way there and back, and norms of one's own."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from versions import torch_norm

import syncbn
from syncbn.nn.affine import ChannelAffine
from syncbn.nn.frozen import FrozenStatistics

NORMS = {
    "gn": {"num_groups": 3},
    "ln": {},
    "in": {},
    "frozen": {},
    "none": {},
}
KINDS = {
    "gn": nn.GroupNorm,
    "ln": nn.GroupNorm,
    "in": nn.GroupNorm,
    "frozen": FrozenStatistics,
    "none": ChannelAffine,
}
LAYERS = {  # name: class and the shape of an input
    "1d": (nn.BatchNorm1d, (4, 6, 5)),
    "flat": (nn.BatchNorm1d, (4, 6)),
    "2d": (nn.BatchNorm2d, (4, 6, 3, 2)),
    "3d": (nn.BatchNorm3d, (4, 6, 2, 3, 2)),
    "torch's sync": (nn.SyncBatchNorm, (4, 6, 3, 2)),
    "sync": (syncbn.SyncBatchNorm, (4, 6, 3, 2)),
}
EPS = 0.01


def filled(cls, num_features=6, **options):
    """A layer whose every number differs from its start value."""
    layer = torch_norm(cls, num_features, eps=EPS, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in layer.state_dict().items():
            if name == "num_batches_tracked":
                value.fill_(7)
            elif name == "running_var":
                value.uniform_(0.5, 2, generator=generator)
            else:
                value.normal_(generator=generator)
    return layer


def reference(norm, x, weight, bias, mean, var):
    """The norm's equation in float64, by other operators than the module's."""
    x, weight, bias, mean, var = (None if t is None else t.detach().double() for t in (x, weight, bias, mean, var))
    per_channel = (-1, *[1] * (x.dim() - 2))
    if norm == "gn":
        grouped = x.unflatten(1, (3, -1)).flatten(2)
        spread = grouped.var(2, correction=0, keepdim=True) + EPS
        y = ((grouped - grouped.mean(2, keepdim=True)) / spread.sqrt()).reshape(x.shape)
    elif norm == "ln":
        y = F.layer_norm(x, x.shape[1:], eps=EPS)
    elif norm == "in":
        y = F.instance_norm(x, eps=EPS) if x.dim() > 2 else torch.zeros_like(x)
    elif norm == "frozen":
        y = (x - mean.view(per_channel)) / (var.view(per_channel) + EPS).sqrt()
    else:
        y = x
    y = y if weight is None else y * weight.view(per_channel)
    return y if bias is None else y + bias.view(per_channel)


def state(layer):
    return [getattr(layer, name) for name in ("weight", "bias", "running_mean", "running_var")]


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}], ids=["affine", "plain", "no bias"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("norm", NORMS)
def test_equal_to_the_reference_and_back(norm, kind, options):
    cls, shape = LAYERS[kind]
    layer = filled(cls, **options)
    before = copy.deepcopy(layer.state_dict())
    parameters = dict(layer.named_parameters())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 3 + 1
    wanted_eval = copy.deepcopy(layer).eval()(x)
    wanted = reference(norm, x, *state(layer))

    syncbn.convert(layer, norm, **NORMS[norm])
    assert type(layer) is KINDS[norm]
    assert all(layer.get_parameter(name) is p for name, p in parameters.items())
    assert list(layer.state_dict()) == list(before if norm == "frozen" else parameters)
    for training in (True, False):
        torch.testing.assert_close(layer.train(training)(x).double(), wanted, rtol=2e-5, atol=2e-5)

    syncbn.revert(layer)
    assert type(layer) is cls
    assert list(layer.state_dict()) == list(before)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(layer(x), wanted_eval)


@pytest.mark.parametrize(
    ("options", "num_groups"),
    [({}, [32, 32]), ({"channels_per_group": 16}, [2, 4]), ({"num_groups": None, "channels_per_group": 1}, [32, 64])],
)
@pytest.mark.parametrize("norm", ["gn", "gn_ws"])
def test_groups_by_number_or_size(norm, options, num_groups):
    model = syncbn.convert(nn.Sequential(nn.BatchNorm2d(32), nn.BatchNorm2d(64)), norm, **options)
    assert [layer.num_groups for layer in model] == num_groups
    assert syncbn.plan(model, norm, **options)[0].reason == "already"


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_are_those_of_the_equation(norm):
    layer = syncbn.convert(filled(nn.BatchNorm2d), norm, **NORMS[norm]).double()
    x = torch.randn(2, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, layer.weight, layer.bias))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_keep_their_dtype(norm, dtype):
    layer = filled(nn.BatchNorm2d)
    x = torch.randn(4, 6, 3, 2, generator=torch.Generator().manual_seed(3)).to(dtype)
    wanted = reference(norm, x, *state(layer))
    y = syncbn.convert(layer, norm, **NORMS[norm])(x)
    assert y.dtype == dtype
    rounding = torch.finfo(dtype).eps * 2  # of the output, and of one product before it
    torch.testing.assert_close(y.double(), wanted, rtol=rounding, atol=rounding * float(wanted.abs().max()))
    assert layer.to(dtype)(x).dtype == dtype
    with torch.autocast("cpu", dtype):
        assert layer.float()(x).dtype == (dtype if norm in ("frozen", "none") else layer(x).dtype)
    assert syncbn.revert(layer).running_var.dtype == torch.float32


def test_frozen_statistics_never_move_and_take_what_is_loaded():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), filled(nn.BatchNorm2d))
    other, written = filled(nn.BatchNorm2d).state_dict(), copy.deepcopy(model[1].state_dict())
    syncbn.convert(model, "frozen").train()
    (model(torch.randn(4, 3, 2, 2)) ** 2).sum().backward()
    assert model[1].weight.grad.abs().sum() > 0
    torch.testing.assert_close(model[1].state_dict(), written, rtol=0, atol=0)
    other["running_mean"] += 1
    model[1].load_state_dict(other)
    syncbn.convert(model.double(), "bn")
    assert type(model[1]) is nn.BatchNorm2d
    torch.testing.assert_close(model[1].running_mean, other["running_mean"].double(), rtol=0, atol=0)


def test_frozen_needs_statistics():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ValueError, match=r"(?s)converted to 'frozen'.*1: .*track_running_stats=False"):
        syncbn.convert(model, "frozen")
    assert type(model[0]) is nn.BatchNorm1d
    syncbn.convert(model, "frozen", exclude=["1"])
    assert [type(m) for m in model] == [FrozenStatistics, nn.BatchNorm1d]


def test_a_map_of_one_value_gives_the_bias():
    layer = syncbn.convert(filled(nn.BatchNorm2d), "in")
    wanted = layer.bias.view(1, 6, 1, 1).expand(2, 6, 1, 1)
    torch.testing.assert_close(layer(torch.randn(2, 6, 1, 1)), wanted, rtol=0, atol=1e-5)  # x - mean rounds


def test_none_keeps_the_memory_format_and_checks_the_channels():
    layer = syncbn.convert(filled(nn.BatchNorm2d), "none")
    x = torch.randn(2, 6, 4, 4).to(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    assert repr(layer) == "ChannelAffine(6)"
    for shape in ((6,), (2, 1, 4, 4)):
        with pytest.raises(ValueError, match=r"expected an input \(N, 6, \*\), got shape"):
            layer(torch.randn(shape))


@pytest.mark.parametrize("norm", NORMS)
def test_fused_activation_is_kept(norm):
    import timm

    fused = filled(timm.layers.BatchNormAct2d)
    x = torch.randn(4, 6, 3, 2)
    wanted, evaluated = reference(norm, x, *state(fused)).relu(), copy.deepcopy(fused).eval()(x)
    for _ in range(2):
        syncbn.convert(fused, norm, **NORMS[norm])
    torch.testing.assert_close(fused(x).double(), wanted, rtol=2e-5, atol=2e-5)
    assert torch.equal(syncbn.revert(fused).eval()(x), evaluated)
    assert not fused._forward_hooks


def small():
    return nn.Sequential(nn.Conv2d(3, 6, 1), filled(nn.BatchNorm2d), nn.ReLU(), filled(nn.BatchNorm2d))


@pytest.mark.parametrize("norm", NORMS)
def test_plan_twice_filters_and_copies(norm):
    model, options = small(), NORMS[norm]
    wanted = [("1", "BatchNorm2d", KINDS[norm].__name__, "replaced"), ("3", "BatchNorm2d", None, "excluded by '3'")]
    assert syncbn.plan(model, norm, exclude=["3"], **options) == wanted
    assert type(model[1]) is nn.BatchNorm2d
    syncbn.convert(model, norm, include=["1"], **options)
    assert type(model[3]) is nn.BatchNorm2d
    assert syncbn.plan(model, norm, **options)[0].reason == "already"
    x = torch.randn(4, 3, 2, 2)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert syncbn.plan(other, norm, **options)[0].reason == "already"
        assert torch.equal(other.eval()(x), model.eval()(x))
        syncbn.revert(other)
        torch.testing.assert_close(other.state_dict(), small().state_dict() | model[0].state_dict(prefix="0."))


def test_a_chain_of_norms_ends_where_it_began():
    model = small()
    parameters, before = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    chain = [("gn", {"num_groups": 2}), ("ln", {}), ("frozen", {}), ("syncbn", {}), ("none", {}), ("in", {})]
    for norm, options in [*chain, ("frozen", {}), (PerChannel, {}), ("ln", {})]:
        syncbn.convert(model, norm, **options)
    assert model[1].num_groups == 1
    assert not hasattr(model[1], "num_features_squared")
    syncbn.convert(model, "frozen")
    assert torch.equal(model[1].running_var, before["1.running_var"])
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    syncbn.convert(model, "bn")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert vars(model[1]).keys() == vars(small()[1]).keys()


class PerChannel(nn.Module):
    """A user's norm: a weight of another shape, a bias of the same, a buffer not saved, an eps that is learned."""

    def __init__(self, num_features, power=1.0):
        super().__init__()
        if num_features % 2:
            raise ValueError(f"expected an even number of channels, got {num_features}")
        self.num_features_squared = num_features**2
        self.power = power
        self.weight = nn.Parameter(torch.full((num_features, 1, 1), 2.0))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.eps = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("offset", torch.tensor(3.0), persistent=False)
        self.drop_out = nn.Dropout()

    def forward(self, input):
        y = self.weight * input**self.power + self.bias.view(-1, 1, 1) + self.eps + self.offset
        return self.drop_out(y)


def test_a_norm_of_ones_own():
    model = small().double().eval()
    weight, bias, before = model[1].weight, model[1].bias, copy.deepcopy(model.state_dict())
    row = syncbn.plan(model, PerChannel, power=2)[0]
    assert row == ("1", "BatchNorm2d", "PerChannel", "replaced")
    syncbn.convert(model, PerChannel, power=2)
    assert type(model[1]) is PerChannel
    assert model[1].bias is bias
    assert sorted(model[1].state_dict()) == ["bias", "eps", "weight"]
    assert {t.dtype for t in [*model.parameters(), *model.buffers()]} == {torch.float64}
    x = torch.randn(2, 6, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(model[1](x), 2 * x**2 + bias.view(-1, 1, 1) + 3.5)
    with torch.no_grad():
        model[1].weight.fill_(5)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        syncbn.convert(other, PerChannel, power=2)  # again: nothing changes
        syncbn.convert(other, partial(PerChannel, power=2))  # nor said in another way
        assert (other[1].weight == 5).all()
    syncbn.convert(model, PerChannel, power=3)
    assert (model[1].weight == 2).all()
    syncbn.revert(model)
    assert model[1].weight is weight
    assert model[1].eps == EPS
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_what_was_set_aside_follows_the_dtype():
    layer = syncbn.convert(filled(nn.BatchNorm2d), PerChannel).double()
    assert {t.dtype for t in syncbn.revert(layer).state_dict().values()} == {torch.float64, torch.int64}
    with torch.device("meta"):
        layer = nn.BatchNorm2d(4)
    assert all(p.is_meta for p in syncbn.convert(layer, PerChannel).parameters())


class MyBatchNorm(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input) + 1


@pytest.mark.parametrize("norm", [MyBatchNorm, nn.SyncBatchNorm, partial(syncbn.SyncBatchNorm, process_group=1)])
@pytest.mark.parametrize("kind", ["2d", "torch's sync", "sync"])
def test_a_batchnorm_of_ones_own_keeps_the_statistics(norm, kind):
    layer = filled(LAYERS[kind][0])
    mean, keys, attributes = layer.running_mean, list(layer.state_dict()), set(vars(layer))
    syncbn.convert(layer, norm, momentum=0.5, eps=EPS)
    assert type(layer) is getattr(norm, "func", norm)
    assert layer.momentum == 0.5
    assert layer.running_mean is mean
    assert list(layer.state_dict()) == keys
    syncbn.convert(layer, "ln")
    syncbn.revert(layer)
    assert (type(layer), layer.momentum, layer.running_mean) == (LAYERS[kind][0], 0.1, mean)
    assert set(vars(layer)) == attributes


def test_norms_without_parameters_leave_none_and_revert_brings_them_back():
    for norm in (nn.InstanceNorm2d, nn.Identity):
        layer = filled(nn.BatchNorm2d)
        before = dict(layer.named_parameters())
        syncbn.convert(layer, norm)
        assert not list(layer.parameters())
        assert dict(syncbn.revert(layer).named_parameters()) == before
    layer = syncbn.convert(nn.BatchNorm2d(4, affine=False), partial(nn.GroupNorm, 2))
    assert layer.weight.shape == (4,)
    assert syncbn.revert(layer).weight is None


def test_a_fused_layer_activates_once():
    import timm

    x = torch.randn(2, 6, 3, 3)
    for norm in (partial(nn.GroupNorm, 2), partial(timm.layers.GroupNormAct, num_groups=2)):
        fused = timm.layers.BatchNormAct2d(6, act_layer=nn.SiLU)
        act = fused.act
        syncbn.convert(fused, norm)
        assert fused.act is act
        torch.testing.assert_close(fused(x), F.silu(F.group_norm(x, 2)))
        assert type(syncbn.revert(fused)) is timm.layers.BatchNormAct2d
    with pytest.raises(ValueError, match=r"Sequential, which would run the layer's drop and act"):
        syncbn.convert(fused, sequence)


def sequence(num_features):
    return nn.Sequential(nn.GroupNorm(1, num_features), nn.ReLU())


def hooked(num_features):
    module = nn.GroupNorm(1, num_features)
    module.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize(
    ("norm", "options", "message"),
    [
        (PerChannel, {}, "(?s)converted to 'PerChannel'.*1: expected an even number of channels, got 3"),
        (partial(PerChannel, power=2), {}, "(?s)converted to 'PerChannel'.*1: expected an even"),
        (PerChannel, {"size": 2}, "1: .*unexpected keyword argument 'size'"),
        (nn.GroupNorm, {}, "1: .*missing 1 required positional argument: 'num_channels'"),
        (abs, {}, "1: abs made a int, expected an nn.Module"),
        (hooked, {}, "1: hooked made a module that is lazy, parametrized or has hooks"),
        (partial(nn.LazyInstanceNorm2d), {}, "1: LazyInstanceNorm2d made a module that is lazy"),
        ("gn", {"num_groups": "3"}, r"1: num_groups='3' does not divide its 3 .*choose one of \[1, 3\]"),
        ("gn", {"num_groups": 3.0}, r"0: num_groups=3.0 does not divide its 6 .*choose one of"),
        ("gn_ws", {"num_groups": True}, r"0: num_groups=True does not divide its 6 .*choose one of"),
        ("gn", {"channels_per_group": 3.0}, r"0: channels_per_group=3.0 does not divide its 6 .*choose one of"),
        ("evonorm_s0", {"num_groups": 3.0}, "0: num_groups=3.0 does not divide its 6"),
        ("evonorm_s0", {"num_groups": 3, "eps": 0}, "0: eps=0: expected a finite number above 0"),
        ("evonorm_b0", {"eps": float("nan")}, "0: eps=nan: expected a finite number above 0"),
        ("frn", {"eps": -1}, "0: eps=-1: expected a finite number above 0"),
        ("frn", {"eps": "a", "learn_eps": True}, "0: eps='a': expected a finite number above 0"),
        ("frn", {"learn_eps": "no"}, "0: learn_eps='no': expected True or False"),
        ("wn", {"mean_only": 1}, "0: mean_only=1: expected True or False"),
        ("gn", {"channels_per_group": 2}, r"1: channels_per_group=2 does not divide its 3 .*choose one of \[1, 3\]"),
        ("gn", {"channels_per_group": 0}, r"0: channels_per_group=0 .*one of \[1, 2, 3, 6\]"),
        ("gn_ws", {"num_groups": 3, "channels_per_group": 1}, "0: expected one of num_groups .*leave one out"),
        (nn.GroupNorm(2, 4), {}, "unknown norm GroupNorm.*expected one of bn, .*none.*, or a class or function"),
        (None, {}, "unknown norm None"),
        (
            PerChannel,
            {"process_group": 2},
            r"process_group belongs to norms that synchronize \(syncbn.*\), not to 'PerChannel'",
        ),
        ("none", {"eps": 1}, "norm 'none' takes no keyword arguments, not eps"),
    ],
)
def test_errors_name_the_layer_and_touch_nothing(norm, options, message):
    model = nn.Sequential(nn.BatchNorm1d(6), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=message):
        syncbn.convert(model, norm, **options)
    assert [type(m) for m in model] == [nn.BatchNorm1d] * 2
    with pytest.warns(UserWarning, match="no layer to convert to 'PerChannel'"):
        syncbn.convert(nn.Linear(1, 1), PerChannel)
