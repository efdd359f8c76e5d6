"""frn, evonorm_s0 and evonorm_b0: each against timm and its formula, on ranks too, and in place of an activation."""

import copy
import pickle
from typing import ClassVar

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
    return x.to(dtype).requires_grad_(), torch.randn(shape, generator=torch.Generator().manual_seed(seed + 100)).to(
        dtype
    )


def step(module, x, dy):
    """Output and gradients; the latter of a random weighing of the former."""
    y = module(x)
    return [y, *torch.autograd.grad((y * dy).sum(), [x, *parameters_of(module)])]


def parameters_of(module):
    return [p for _, p in sorted(module.named_parameters())]


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
    wanted = [wanted, *torch.autograd.grad((wanted * dy).sum(), [x, *parameters_of(layer)])]
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
    assert torch.autograd.gradgradcheck(lambda x, *_: layer(x), (x, *parameters_of(layer)))
    last = inputs(2, 6, 4, 3)[0].to(memory_format=torch.channels_last)
    assert layer(last).is_contiguous(memory_format=torch.channels_last)
    assert layer(torch.empty(0, 6, 2, 2, dtype=torch.float64)).shape == (0, 6, 2, 2)
    with pytest.raises(ValueError, match=r"expected an input of 6 channels \(N, C, \*\), got 5"):
        layer(x[:, :5])


def test_a_learned_eps_of_frn():
    layer, (x, dy) = layer_of("frn", eps=1e-4, learn_eps=True), inputs(4, 6, 1, 1)
    with torch.no_grad():
        layer.eps.fill_(-0.3)
    wanted = torch.max(
        x / (x**2 + 0.3).sqrt() * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1), layer.tau.view(-1, 1, 1)
    )
    torch.testing.assert_close(layer(x), wanted)
    assert torch.autograd.grad((layer(x) * dy).sum(), layer.eps)[0] != 0
    assert list(layer.state_dict()) == ["weight", "bias", "tau", "eps"]


def test_b0_refuses_what_it_cannot_do():
    layer = layer_of("evonorm_b0")
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        layer(inputs(1, 6, 1, 1)[0])
    with pytest.raises(ValueError, match="expected no mask"):
        layer(inputs(4, 6)[0], torch.ones(4, 1, dtype=torch.bool))


def on_ranks(rank, world_size, splits, process_group=None):
    """Two steps of B0 on this rank's part, with a penalty of the input's gradient; and an evaluation."""
    model = nn.Sequential(nn.BatchNorm2d(6, dtype=torch.float64), nn.ReLU())
    layer, results = syncbn.convert(model, "evonorm_b0", process_group=process_group)[0].to(device()), []
    layer.load_state_dict(layer_of("evonorm_b0").state_dict())
    for seed in (1, 2):
        x, dy = (torch.split(t.detach(), splits)[rank].to(device()) for t in inputs(sum(splits), 6, 3, 2, seed=seed))
        results.append([t.detach().cpu() for t in penalized_step(layer, x.requires_grad_(), dy)])
    with torch.no_grad():
        return *results, layer.eval()(x).cpu(), layer.running_var.cpu()


def penalized_step(layer, x, dy):
    """Output, gradient of the input, and the gradients of a loss that holds both; the parameters' by name."""
    y = layer(x)
    [dx] = torch.autograd.grad((y * dy).sum(), x, create_graph=True)
    return [y, dx, *torch.autograd.grad((y * dy).sum() + (dx**3).sum(), [x, *parameters_of(layer)])]


@pytest.mark.parametrize("splits", [(3, 0, 2), (5,), pytest.param((1, 1, 0, 3), marks=pytest.mark.slow)])
def test_b0_on_ranks_equals_timm_on_the_joined_batch(run, splits):
    witness = witness_of("evonorm_b0", layer_of("evonorm_b0"))
    results = run(on_ranks, len(splits), splits)
    for index, seed in enumerate((1, 2)):
        x, dy = inputs(sum(splits), 6, 3, 2, seed=seed)
        with InDouble():
            wanted = penalized_step(witness, x, dy)
        parts = list(zip(*(result[index] for result in results), strict=True))
        got = [torch.cat(part) for part in parts[:3]] + [sum(part) for part in parts[3:]]
        torch.testing.assert_close(got, [w.detach() for w in wanted], rtol=1e-10, atol=1e-10)
    for *_, running_var in results:
        torch.testing.assert_close(running_var, witness.running_var, rtol=1e-12, atol=1e-12)
    with torch.no_grad(), InDouble():
        torch.testing.assert_close(torch.cat([y for *_, y, _ in results]), witness.eval()(x), rtol=1e-11, atol=1e-11)


def test_b0_in_groups_of_ranks(run):
    results = run(on_ranks, 4, (2, 1, 3, 2), 2)
    x, dy = (t[3:].detach() for t in inputs(8, 6, 3, 2, seed=1))
    wanted = penalized_step(layer_of("evonorm_b0"), x.requires_grad_(), dy)[:3]
    got = [torch.cat(part) for part in zip(*(result[0][:3] for result in results[2:]), strict=True)]
    torch.testing.assert_close(got, [w.detach() for w in wanted], rtol=1e-10, atol=1e-10)


def model():
    """Activations behind layers, and elsewhere; a layer whose activation is not known."""
    return nn.ModuleDict(
        {
            "net": nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.SiLU(inplace=True), nn.BatchNorm2d(6)),
            "flat": nn.Sequential(nn.BatchNorm1d(6), nn.ReLU(), nn.ReLU()),
        }
    )


def run_model(m, x):
    y = m["net"](x)
    return y, m["flat"](y.mean((2, 3)))


def numbers_of(m):
    return copy.deepcopy(m.state_dict())


@pytest.mark.parametrize("norm", NORMS)
def test_conversion_takes_the_activation_and_gives_it_back(norm):
    cls, options, added = NORMS[norm]
    m, x = model(), inputs(4, 3, 3, 2, dtype=torch.float32)[0]
    before, act, weight = numbers_of(m), m["net"][2], m["net"][1].weight
    evaluated = run_model(m.eval(), x)
    rows = syncbn.plan(m, norm, **options)
    assert type(act) is nn.SiLU
    assert [(row.name, row.to) for row in rows] == [
        ("net.1", cls.__name__), ("net.2", "Identity"), ("net.3", cls.__name__),
        ("flat.0", cls.__name__), ("flat.1", "Identity"),
    ]  # fmt: skip
    assert rows[0].reason == f"with {cls.ACTIVATION}, in place of SiLU"
    assert rows[2].reason == f"{cls.WITHOUT}: no activation module directly behind it"
    syncbn.convert(m, norm, **options)
    for _ in range(2):
        syncbn.convert(m, norm, **options)
        assert {row.reason for row in syncbn.plan(m, norm, **options)} == {"already"}
        assert m["net"][2] is act
        assert [type(module) for module in m["flat"]] == [cls, nn.Identity, nn.ReLU]
    assert m["net"][1].weight is weight
    assert [name for name in m.state_dict() if name.endswith(added)] == [f"net.1.{added}", f"flat.0.{added}"]
    got = m["net"].train()(x)
    hidden = formula(norm, m["net"][1], m["net"][0](x))
    last = m["net"][3]
    wanted = witness_of(norm, copy.deepcopy(last).double())(hidden.double())
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), m):
        syncbn.revert(other)
        assert [type(module) for module in other.modules()] == [type(module) for module in model().modules()]
        assert vars(other["net"][2]).keys() == vars(nn.SiLU()).keys()
        assert list(other.state_dict()) == list(before)
    if norm != "evonorm_b0":  # whose statistics move
        torch.testing.assert_close(m.state_dict(), before, rtol=0, atol=0)
        torch.testing.assert_close(run_model(m.eval(), x), evaluated, rtol=0, atol=0)


def test_from_one_norm_to_another():
    m = model()
    before = numbers_of(m)
    groups = {"num_groups": 2}
    chain = [("frn", {}), ("frn", {"eps": 1e-3}), ("gn", groups), ("evonorm_b0", {}), ("evonorm_s0", groups)]
    chain += [("syncbn", {}), ("evonorm_b0", {"eps": 1e-2}), ("frn", {})]
    for norm, options in chain:
        syncbn.convert(m, norm, **options)
        contains = norm in NORMS
        assert [type(m["net"][2]), type(m["flat"][1])] == ([nn.Identity] * 2 if contains else [nn.SiLU, nn.ReLU])
        if contains:
            assert getattr(m["flat"][0], NORMS[norm][2]).shape == (6,)
    syncbn.convert(m, "bn", exclude=["flat*"])
    assert [type(m["net"][2]), type(m["flat"][1])] == [nn.SiLU, nn.Identity]
    syncbn.convert(m, "bn")
    torch.testing.assert_close(m.state_dict(), before, rtol=0, atol=0)
    syncbn.convert(m, "frn", include=["flat.0"])
    assert [type(m["net"][2]), type(m["flat"][1])] == [nn.SiLU, nn.Identity]


class Skipping(nn.Sequential):
    def forward(self, x):
        return self[1](x + self[0](x))


class Declared(nn.Module):
    activation_behind: ClassVar = {"norm": "relu"}

    def __init__(self):
        super().__init__()
        self.relu, self.norm = nn.ReLU(), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.relu(self.norm(x)) + x


class Other(Declared):
    def forward(self, x):
        return self.relu(x + self.norm(x))


def test_a_module_says_which_activation_is_behind_which_norm():
    m = nn.Sequential(Declared(), Other())
    syncbn.convert(m, "evonorm_b0")
    assert [type(part.relu) for part in m] == [nn.Identity, nn.ReLU]
    assert list(m.state_dict()) == [
        f"{i}.norm.{name}"
        for i, names in enumerate((("weight", "bias", "v", "running_var"), ("weight", "bias", "running_var")))
        for name in names
    ]
    syncbn.revert(m)
    assert [type(part.relu) for part in m] == [nn.ReLU, nn.ReLU]


@pytest.mark.parametrize("norm", ["frn", "evonorm_s0", "evonorm_b0"])
def test_a_layer_by_itself_has_its_activation(norm):
    options = {"num_groups": 2} if norm == "evonorm_s0" else {}
    layer = nn.BatchNorm2d(4)
    assert syncbn.plan(layer, norm, **options)[0].reason.startswith("with ")
    x = torch.randn(3, 4, 5, 5)
    y = syncbn.convert(layer, norm, **options)(x)
    in_a_model = syncbn.convert(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), norm, **options)
    torch.testing.assert_close(y, in_a_model(x), rtol=0, atol=0)
    fused = syncbn.convert(timm_fused(), norm, **options)
    torch.testing.assert_close(fused(x), y, rtol=0, atol=0)
    assert type(syncbn.revert(layer)) is nn.BatchNorm2d


def timm_fused():
    import timm

    return timm.layers.BatchNormAct2d(4)


def test_an_activation_that_may_serve_elsewhere_stays():
    shared, patched, norm = nn.ReLU(), nn.ReLU(), nn.BatchNorm1d(4)
    patched.forward = torch.relu
    cases = [
        nn.Sequential(nn.BatchNorm1d(4), shared, nn.BatchNorm1d(4), shared),
        nn.Sequential(nn.Sequential(norm, nn.ReLU()), nn.Sequential(norm, nn.Tanh())),
        nn.Sequential(nn.BatchNorm1d(4), patched),
        nn.Sequential(nn.BatchNorm1d(4), nn.PReLU()),
        nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), nn.ReLU()),
        Skipping(nn.BatchNorm1d(4), nn.ReLU()),
        nn.ModuleList([nn.BatchNorm1d(4), nn.ReLU()]),
    ]
    for case in cases:
        classes = [type(module) for module in case.modules() if not isinstance(module, nn.BatchNorm1d)]
        assert all(row.reason.startswith("without TLU: ") for row in syncbn.plan(case, "frn"))
        syncbn.convert(case, "frn")
        assert [type(module) for module in case.modules() if not isinstance(module, FilterResponseNorm)] == classes
        assert not [name for name, _ in case.named_parameters() if name.endswith("tau")]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.filterwarnings("ignore:norm 'evonorm_.*' leaves:UserWarning")
def test_a_fused_layer_activates_by_the_norm_alone(norm):
    import timm

    _, options, _ = NORMS[norm]
    for options_of_layer, follows in (({"act_layer": nn.SiLU}, nn.Tanh()), ({"apply_act": False}, nn.Tanh())):
        fused = timm.layers.BatchNormAct2d(6, **options_of_layer)
        m, (x, _) = nn.Sequential(fused, follows), inputs(4, 6, 3, 2, dtype=torch.float32)
        kinds = [type(fused.act), type(follows)]
        for _ in range(2):
            syncbn.convert(m, norm, **options)
        assert type(fused.act) is nn.Identity
        wanted = formula(norm, fused, x)
        wanted = wanted.tanh() if kinds[0] is nn.SiLU else wanted
        torch.testing.assert_close(m(x), wanted, rtol=1e-4, atol=1e-5)
        syncbn.revert(m)
        assert [type(fused), type(fused.act), type(follows)] == [timm.layers.BatchNormAct2d, *kinds]
    syncbn.convert(fused, norm, **options)  # by itself
    syncbn.revert(fused)


def test_errors_name_the_layer_and_touch_nothing():
    m = nn.Sequential(nn.BatchNorm1d(6), nn.ReLU(), nn.BatchNorm1d(4), nn.ReLU())
    for norm, options, message in (
        (
            "evonorm_s0",
            {"num_groups": 3},
            r"2: num_groups=3 does not divide its 4 channels; choose one of \[1, 2, 4\]",
        ),
        ("frn", {"process_group": 2}, "norms that synchronize .*evonorm_b0"),
        ("frn", {"num_groups": 2}, "norm 'frn' takes eps, learn_eps, not num_groups"),
    ):
        with pytest.raises(ValueError, match=rf"(?s){message}"):
            syncbn.convert(m, norm, **options)
        assert [type(module) for module in m] == [nn.BatchNorm1d, nn.ReLU] * 2


@pytest.mark.parametrize("norm", ["evonorm_s0", "evonorm_b0"])
def test_one_warning_if_no_layer_is_left_to_normalize(norm):
    m = nn.ModuleList([nn.BatchNorm2d(32), nn.ReLU(), nn.BatchNorm2d(32)])
    for call in (syncbn.plan, syncbn.convert):
        with pytest.warns(UserWarning, match=f"'{norm}' leaves .* behind 0, 2, which become weight") as caught:
            call(m, norm)
        assert [warning.filename for warning in caught] == [__file__]
    syncbn.convert(m, norm)  # already


def test_audit_lists_b0_where_it_reads_the_batch():
    m = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6))
    report = syncbn.audit(syncbn.convert(m, "evonorm_b0"), torch.randn(4, 6, 3, 2), 2, 2)
    assert [row.name for row in report.rows] == ["0"]


def test_b0_has_the_statistics_of_a_batchnorm():
    layer = syncbn.convert(nn.Sequential(nn.BatchNorm2d(6).double(), nn.ReLU()), "evonorm_b0")
    x, _ = inputs(4, 6, 3, 2)
    syncbn.update_bn_stats(layer, [x.detach()])
    var = x.detach().transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(layer[0].running_var, var)
    syncbn.average_bn_stats(layer)
    syncbn.freeze(layer).train()
    torch.testing.assert_close(layer(x), formula("evonorm_b0", layer[0], x, var))
    torch.testing.assert_close(layer[0].running_var, var)
    [row] = syncbn.audit(syncbn.unfreeze(layer), x.detach(), per_rank_batch_size=2, world_size=2).rows
    assert (row.kind, row.count) == ("EvoNormB0", 12)
    syncbn.revert(layer)
    torch.testing.assert_close(layer[0].running_mean, x.detach().mean((0, 2, 3)))


def test_b0_averages_over_all_batches_and_may_track_none():
    layer = EvoNormB0(nn.BatchNorm2d(6, momentum=None, dtype=torch.float64))
    batches = [inputs(4, 6, 3, 2, seed=seed)[0].detach() for seed in range(3)]
    for x in batches:
        layer(x)
    torch.testing.assert_close(layer.running_var, sum(x.transpose(0, 1).flatten(1).var(1) for x in batches) / 3)
    assert list(layer.state_dict()) == ["weight", "bias", "v", "running_var", "num_batches_tracked"]
    layer = EvoNormB0(nn.BatchNorm2d(6, affine=False, track_running_stats=False, dtype=torch.float64)).eval()
    assert list(layer.state_dict()) == ["v"]
    assert torch.equal(layer(x), layer.train()(x))


@pytest.mark.parametrize("written", [nn.SyncBatchNorm(6), syncbn.SyncBatchNorm(6, process_group=2)])
def test_b0_keeps_the_group_that_a_layer_was_written_with(written):
    layer, group = nn.Sequential(written, nn.ReLU()), written.process_group
    attributes = dict(vars(written))
    syncbn.convert(layer, "evonorm_b0")
    assert (type(written), written.process_group) == (EvoNormB0, group)
    syncbn.convert(layer, "evonorm_b0", process_group=4)
    assert written.process_group == 4
    syncbn.revert(copy.deepcopy(layer))
    assert vars(syncbn.revert(layer)[0]).keys() == attributes.keys()
    assert written.process_group == group
    assert syncbn.convert(layer, "evonorm_b0")[0].process_group == group
    syncbn.revert(layer)


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_compiles_without_a_break(norm):
    layer, (x, dy) = layer_of(norm), inputs(4, 6, 3, 2)
    state = copy.deepcopy(layer.state_dict())
    wanted = [*step(layer, x, dy), *layer.state_dict().values()]
    layer.load_state_dict(state)
    got = [*step(torch.compile(layer, backend="aot_eager", fullgraph=True), x, dy), *layer.state_dict().values()]
    torch.testing.assert_close([t.detach() for t in got], [t.detach() for t in wanted], rtol=1e-11, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.filterwarnings("ignore:norm 'evonorm_.*' leaves:UserWarning")  # torchvision's ResNets
def test_models_of_timm_and_torchvision(norm):
    import timm
    import torchvision

    cls, options, _ = NORMS[norm]
    options = {"num_groups": 4} if norm == "evonorm_s0" else options
    nets = {
        timm.create_model("efficientnet_b0"): True,
        timm.create_model("resnet10t"): True,
        timm.create_model("resnet26"): True,
        torchvision.models.mobilenet_v2(): True,
        torchvision.models.resnet18(): False,
    }
    for net, is_known in nets.items():
        before, kinds = numbers_of(net), [type(module) for module in net.modules()]
        rows = syncbn.plan(net, norm, **options)
        assert any(row.reason.startswith("with ") for row in rows) == is_known
        assert syncbn.convert(net, norm, **options) is net
        assert any(isinstance(module, cls) for module in net.modules())
        out = net(torch.randn(2, 3, 64, 64))
        (out * torch.randn(out.shape)).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        syncbn.revert(net)
        assert [type(module) for module in net.modules()] == kinds
        assert list(net.state_dict()) == list(before)
