"""Standardized and normalized weights: numbers, which layer belongs to which BatchNorm, the way there and back."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

import syncbn
from syncbn.conversion.norms.weights import pairs_of

F64 = torch.float64
ARMS = {"gn_ws": {"num_groups": 2}, "wn": {}, "wn mean only": {"mean_only": True}}


def convert(model, arm, **options):
    return syncbn.convert(model, arm.split()[0], **ARMS[arm], **options)


def net():
    """A convolution, a transposed one, and a linear layer, each before its BatchNorm, as if trained."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2, stride=2, bias=False),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(4 * 8 * 8, 6),
        nn.BatchNorm1d(6),
        nn.Linear(6, 2),
    )
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.copy_(torch.rand(tensor.shape) + 0.5)
    return model


@pytest.mark.parametrize(
    ("channels", "kernel", "groups", "bias"),
    [((3, 5), 3, 1, True), ((4, 6), (1, 3), 2, False), ((6, 6), 3, 6, True), ((16, 4), 1, 1, False)],
)
def test_standardized_as_timm_does(channels, kernel, groups, bias):
    from timm.layers import StdConv2d

    conv = nn.Conv2d(*channels, kernel, groups=groups, bias=bias, dtype=F64)
    theirs = StdConv2d(*channels, kernel, padding=0, groups=groups, bias=bias, dtype=F64)
    theirs.load_state_dict(conv.state_dict())
    weight = conv.weight
    syncbn.convert(nn.Sequential(conv, nn.BatchNorm2d(channels[1])), "gn_ws", num_groups=1)
    x = torch.randn(2, channels[0], 5, 6, dtype=F64, requires_grad=True)
    y = conv(x)
    assert conv.parametrizations.weight.original is weight
    assert not torch.allclose(y, F.conv2d(x, weight, conv.bias, groups=groups))
    dy = torch.randn_like(y)
    mine, wanted = (torch.autograd.grad(m(x), (x, *m.parameters()), dy) for m in (conv, theirs))
    torch.testing.assert_close(y, theirs(x), rtol=1e-9, atol=1e-9)
    by_shape = {gradient.shape: gradient for gradient in wanted}
    for gradient in mine:  # the order of parameters differs
        torch.testing.assert_close(gradient, by_shape[gradient.shape], rtol=1e-9, atol=1e-9)


CONVOLUTIONS = [
    (nn.Conv1d, 1),
    (nn.Conv3d, 2),
    (nn.ConvTranspose1d, 2),
    (nn.ConvTranspose2d, 1),
    (nn.ConvTranspose3d, 4),
]


@pytest.mark.parametrize(("cls", "groups"), CONVOLUTIONS)
def test_standardized_per_output_channel_of_any_convolution(cls, groups):
    conv = cls(8, 4, 2, groups=groups, dtype=F64)
    weight = conv.weight.detach().clone()
    syncbn.convert(nn.Sequential(conv, nn.BatchNorm2d(4)), "gn_ws", num_groups=1)
    for channel in range(4):  # of the output, by what the equation of a convolution says
        group, inside = divmod(channel, 4 // groups)
        inputs = slice(group * 8 // groups, (group + 1) * 8 // groups)
        index = (inputs, inside) if "Transpose" in cls.__name__ else (channel,)
        wanted = (weight[index] - weight[index].mean()) / (weight[index].var(correction=0) + 1e-6).sqrt()
        torch.testing.assert_close(conv.weight[index], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cls", [nn.Conv1d, nn.ConvTranspose1d])
@pytest.mark.parametrize("arm", ARMS)
def test_second_order(arm, cls):
    model = convert(nn.Sequential(cls(2, 4, 2), nn.BatchNorm1d(4)).double(), arm)
    if arm != "gn_ws":
        model[0].parametrizations.weight.original0.data *= 1.5
    x = torch.randn(2, 2, 3, dtype=F64, requires_grad=True)
    parameters = dict(model.named_parameters())

    def function(x, *values):
        return torch.func.functional_call(model, dict(zip(parameters, values, strict=True)), x)

    assert torch.autograd.gradgradcheck(function, (x, *parameters.values()), fast_mode=True)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_stay_half(arm, dtype):
    model = convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), arm)
    x = torch.randn(2, 3, 5, 5)
    wanted = model(x.to(dtype).float())
    y = model.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), wanted, rtol=0, atol=16 * torch.finfo(dtype).eps)  # of a sum of 27


@pytest.mark.slow
@pytest.mark.parametrize("arm", ARMS)
def test_one_graph(arm):
    torch.compiler.reset()
    model, x = convert(net(), arm), torch.randn(3, 3, 4, 4)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


def test_neither_linear_layers_nor_single_weights_are_standardized():
    layers = [nn.Conv2d(4, 4, 1, groups=4), nn.BatchNorm2d(4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Conv2d(4, 4, 1)]
    model = syncbn.convert(nn.Sequential(*layers), "gn_ws", num_groups=2)
    assert [type(m).__name__ for m in model] == ["Conv2d", "GroupNorm", "Linear", "GroupNorm", "Conv2d"]


def test_the_layer_of_a_batchnorm_is_the_last_one_registered_before_it():
    layers = {
        "first": nn.BatchNorm2d(3),
        "a": nn.Conv2d(3, 4, 1),
        "of_a": nn.BatchNorm2d(4),
        "second_of_a": nn.BatchNorm2d(4),
        "b": nn.Conv2d(4, 4, 1),
        "c": nn.Conv2d(4, 6, 1),
        "other_width": nn.BatchNorm2d(4),
        "of_c": nn.Sequential(nn.ReLU(), nn.BatchNorm2d(6)),
        "d": nn.Sequential(nn.Linear(6, 2)),
        "of_d": nn.BatchNorm1d(2),
    }
    model = nn.ModuleDict(layers)
    names = {module: name for name, module in model.named_modules()}
    wanted = {"of_a": "a", "of_c.1": "c", "of_d": "d.0"}
    assert {names[norm]: name for norm, (name, _) in pairs_of(model).items()} == wanted
    for norm in ("gn", "syncbn"):  # whatever they are by then
        syncbn.convert(model, norm, **({"num_groups": 1} if norm == "gn" else {}))
        assert {names[norm]: name for norm, (name, _) in pairs_of(model).items()} == wanted


def test_plan_lists_both_and_touches_nothing():
    model = net()
    before = {id(m): type(m) for m in model.modules()}
    assert syncbn.plan(model, "wn", exclude=["4"]) == [
        ("1", "BatchNorm2d", "ChannelBias", "replaced"),
        ("0", "Conv2d", "ParametrizedConv2d", "weight normalized, together with 1"),
        ("4", "BatchNorm2d", None, "excluded by '4'"),
        ("7", "BatchNorm1d", "ChannelBias", "replaced"),
        ("6", "Linear", "ParametrizedLinear", "weight normalized, together with 7"),
    ]
    assert [row.name for row in syncbn.plan(model, "gn_ws", num_groups=2)] == ["1", "0", "4", "3", "7"]
    assert {id(m): type(m) for m in model.modules()} == before
    syncbn.convert(model, "wn", include=["1"])
    assert [parametrize.is_parametrized(m) for m in model].count(True) == 1
    row = syncbn.plan(model, "gn_ws", include=["1"], num_groups=2)[1]
    assert row == ("0", "ParametrizedConv2d", "ParametrizedConv2d", "weight standardized, together with 1")
    assert [row.reason for row in syncbn.plan(model, "wn", include=["1"]) if row.to] == ["already"]


@pytest.mark.parametrize("arm", ARMS)
def test_there_and_back_bit_for_bit(arm):
    model = net()
    before, objects = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    attributes = [set(vars(m)) for m in model]
    x = torch.randn(3, 3, 4, 4)
    wanted = copy.deepcopy(model).eval()(x)
    for _ in range(2):
        convert(model, arm)
    syncbn.convert(model, "gn_ws", num_groups=1)
    convert(model, "wn")
    syncbn.convert(convert(model, arm), "syncbn")
    assert not any(map(parametrize.is_parametrized, model.modules()))
    syncbn.revert(convert(model, arm))
    assert [type(m) for m in model] == [type(m) for m in net()]
    assert list(model.state_dict()) == list(before)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p is objects[name] for name, p in model.named_parameters())
    assert [set(vars(m)) for m in model] == attributes
    assert not any(m._load_state_dict_pre_hooks for m in model)
    assert torch.equal(model.eval()(x), wanted)


@pytest.mark.parametrize("arm", ARMS)
def test_trained_weights_come_back(arm):
    model = convert(net().double(), arm)
    x = torch.randn(3, 3, 4, 4, dtype=F64)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    (model(x) * torch.randn(3, 2, dtype=F64)).sum().backward()
    optimizer.step()
    wanted = {name: model[i].weight for name, i in (("conv", 0), ("transposed", 3), ("linear", 6))}
    raw = model[0].parametrizations.weight.original if arm == "gn_ws" else wanted["conv"]
    syncbn.revert(model)
    torch.testing.assert_close(model[0].weight, raw, rtol=1e-12, atol=0)
    if arm != "gn_ws":
        torch.testing.assert_close(model[3].weight, wanted["transposed"], rtol=1e-12, atol=0)
        torch.testing.assert_close(model[6].weight, wanted["linear"], rtol=1e-12, atol=0)
    assert all(type(model[i].weight) is nn.Parameter and model[i].weight.is_leaf for i in (0, 3, 6))


@pytest.mark.parametrize("arm", ARMS)
def test_copies_are_reverted_by_themselves(arm):
    model, x = convert(net(), arm).eval(), torch.randn(3, 3, 4, 4)
    wanted = model(x)
    twin = copy.deepcopy(model)
    syncbn.revert(twin)
    assert torch.equal(model(x), wanted)
    assert type(twin[0]) is nn.Conv2d
    other = copy.deepcopy(model)
    syncbn.revert(model)
    assert torch.equal(other(x), wanted)
    again = convert(net(), arm).eval()
    again.load_state_dict(other.state_dict())
    assert torch.equal(again(x), wanted)
    with pytest.raises(RuntimeError, match="parametrized modules is only supported through state_dict"):
        pickle.dumps(other)
    assert type(pickle.loads(pickle.dumps(model))[0]) is nn.Conv2d


def shared():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model[2].weight = model[0].weight
    return model


def twice(own_layer=True):
    norm, layer = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
    return nn.Sequential(layer, norm, nn.Conv2d(4, 4, 1) if own_layer else layer, norm)


def zero():
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 1), nn.BatchNorm2d(4))
    model[0].weight.data[:, 1:3] = 0
    return model


def before(layer, num=4):
    return lambda: nn.Sequential(layer(), nn.BatchNorm2d(num))


REFUSED = {
    "nothing before": (
        "wn",
        lambda: nn.Sequential(nn.BatchNorm2d(4)),
        "0: expected a convolution or linear layer of 4",
    ),
    "another width": ("wn", before(lambda: nn.Conv2d(3, 5, 1)), r"of 4 outputs registered.*exclude=\['1'\]"),
    "transposed": ("wn", before(lambda: nn.ConvTranspose2d(4, 4, 1, groups=2)), r"ConvTranspose2d 0 is .*groups=2"),
    "spectral": (
        "wn",
        before(lambda: spectral_norm(nn.Conv2d(3, 4, 1))),
        "ParametrizedConv2d 0 is parametrized already",
    ),
    "spectral, ws": ("gn_ws", before(lambda: spectral_norm(nn.Conv2d(3, 4, 1))), "is parametrized already"),
    "old hook": ("gn_ws", before(lambda: nn.utils.spectral_norm(nn.Conv2d(3, 4, 1))), "has no parameter 'weight'"),
    "lazy": ("gn_ws", before(lambda: nn.LazyConv2d(4, 1)), "LazyConv2d 0 is lazy; run one batch first"),
    "shared": ("wn", shared, r"1: its Conv2d 0 shares its weight(.|\n)*3: its Conv2d 2 shares"),
    "twice": ("wn", twice, r"one layer, 0, would change for .* in the model: 1 and 3; or .*exclude=\['1'\]"),
    "twice, ws": ("gn_ws", twice, "one layer, 0, would change for .* in the model: 1 and 3"),
    "zero": ("wn", zero, "has 2 output channels whose weight is 0, without a direction"),
    "group": ("wn", before(lambda: nn.Conv2d(3, 4, 1)), "1: process_group belongs to mean_only=True"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.spectral_norm:FutureWarning")
def test_what_is_refused_is_named_and_not_touched(name):
    norm, make, message = REFUSED[name]
    model = make()
    classes = [type(m) for m in model.modules()]
    buffers = [b.clone() for b in model.buffers()]
    options = {"num_groups": 1} if norm == "gn_ws" else {"process_group": 2} if name == "group" else {}
    with pytest.raises(ValueError, match=message):
        syncbn.convert(model, norm, **options)
    assert [type(m) for m in model.modules()] == classes
    assert any(row.to is None for row in syncbn.plan(model, norm, **options))
    assert all(map(torch.equal, model.buffers(), buffers))
    with pytest.warns(UserWarning, match="no layer to convert"):
        syncbn.convert(model, norm, exclude=["*"], **options)


@pytest.mark.parametrize("arm", ARMS)
def test_both_layers_may_run_twice(arm):
    model = convert(twice(own_layer=False), arm)
    assert parametrize.is_parametrized(model[0])
    assert type(syncbn.revert(model)[2]) is nn.Conv2d


def test_what_the_user_did_since():
    model = convert(net(), "gn_ws")
    spectral_norm(model[3])
    for back in (syncbn.revert, syncbn.convert):
        with pytest.raises(ValueError, match="3 was parametrized or sharded after conversion; undo that first"):
            back(model)
    assert parametrize.is_parametrized(model[0])
    parametrize.remove_parametrizations(model[3], "weight")  # weights baked in, as for export
    baked = model[3].weight
    syncbn.revert(model)
    assert type(model[0]) is nn.Conv2d
    assert model[3].weight is baked


@pytest.mark.slow
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("name", ["torchvision resnet18", "torchvision mobilenet_v3_small", "timm resnet26d"])
def test_models_of_others(arm, name):
    import timm
    import torchvision

    library, name = name.split()
    model = torchvision.models.get_model(name) if library == "torchvision" else timm.create_model(name)
    before = copy.deepcopy(model.state_dict())
    num_norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    convert(model, arm)
    num_weights = sum(map(parametrize.is_parametrized, model.modules()))
    assert num_weights == num_norms  # of each BatchNorm
    x = torch.randn(2, 3, 64, 64)
    if arm != "gn_ws":
        syncbn.initialize_weight_norm(model, x)
    assert model(x).isfinite().all()
    assert list(syncbn.revert(model).state_dict()) == list(before)
