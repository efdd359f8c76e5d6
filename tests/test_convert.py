"""plan, convert and revert: nothing lost, nothing silent, and the way back exact."""

import copy
import pickle
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel
from versions import torch_norm

import syncbn
from syncbn import SyncBatchNorm
from syncbn.nn.converted import SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d


def torchvision():
    import torchvision

    return torchvision


def timm():
    import timm

    return timm


def small():
    torch.manual_seed(0)
    shared = nn.BatchNorm2d(4)
    model = nn.Module()
    model.stem = nn.Sequential(nn.Conv2d(3, 4, 3), shared, nn.ReLU())
    model.head = nn.ModuleDict({"bn": shared, "again": nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))})
    return model


def signature(model):
    """All that conversion must keep: parameter objects, keys, training flags, hooks, attributes."""
    return (
        {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)},
        list(model.state_dict()),
        {name: m.training for name, m in model.named_modules()},
        {name: list(m._forward_hooks.values()) for name, m in model.named_modules()},
        {name: id(m) for name, m in model.named_modules(remove_duplicate=False)},
    )


def note(module, args, output):
    """A hook."""


BECOMES = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
}


@pytest.mark.parametrize("cls", BECOMES)
def test_a_bare_layer(cls):
    layer = torch_norm(cls, 3, eps=1e-3, momentum=None, bias=False).eval()
    layer.note = "mine"
    layer.register_forward_hook(note)
    before, original = signature(layer), copy.deepcopy(layer.state_dict())
    assert syncbn.convert(layer) is layer
    assert type(layer) is BECOMES[cls]
    assert isinstance(layer, SyncBatchNorm)
    assert isinstance(layer, cls) is (cls is not nn.SyncBatchNorm)
    assert (layer.eps, layer.momentum, layer.bias, layer.note) == (1e-3, None, None, "mine")
    assert signature(layer) == before
    assert syncbn.revert(layer) is layer
    assert type(layer) is cls
    assert signature(layer) == before
    assert "_syncbn_original" not in vars(layer)
    assert "group_spec" not in vars(layer)
    torch.testing.assert_close(layer.state_dict(), original, rtol=0, atol=0)


def test_shared_layers_stay_shared_and_twice_is_once():
    model = small()
    before = signature(model)
    syncbn.convert(model, process_group=2)
    assert model.stem[1] is model.head["bn"]
    assert signature(model) == before
    syncbn.convert(model)
    assert model.stem[1].process_group == 2
    syncbn.convert(model, process_group=4)
    assert model.stem[1].process_group == 4
    syncbn.revert(syncbn.revert(model))
    assert {type(m) for m in model.modules() if "Batch" in type(m).__name__} == {nn.BatchNorm2d}


def test_dimensions_are_checked_as_before():
    layer = syncbn.convert(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="4D"):
        layer(torch.randn(2, 3))
    syncbn.convert(nn.SyncBatchNorm(3))(torch.randn(2, 3))


def test_optimizer_stays_valid_and_copies_work():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    syncbn.convert(model)
    (model(torch.randn(5, 3)) ** 3).sum().backward()
    before = model[1].weight.clone()
    optimizer.step()
    assert not torch.equal(model[1].weight, before)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), AveragedModel(model).module):
        assert type(other[1]) is SyncBatchNorm1d
        assert type(syncbn.revert(other)[1]) is nn.BatchNorm1d
    assert type(model[1]) is SyncBatchNorm1d


@pytest.mark.parametrize("norm", ["syncbn", "gn"])
def test_on_the_meta_device(norm):
    with torch.device("meta"):
        layer = nn.BatchNorm2d(32)
    syncbn.convert(layer, norm)
    assert layer.weight.is_meta
    assert type(syncbn.revert(layer)) is nn.BatchNorm2d


MODELS = {
    "resnet50": lambda: torchvision().models.resnet50(),
    "mobilenet_v3": lambda: torchvision().models.mobilenet_v3_small(),
    "densenet121": lambda: torchvision().models.densenet121(),
    "deeplabv3": lambda: torchvision().models.segmentation.deeplabv3_resnet50(weights_backbone=None),
    "r3d_18": lambda: torchvision().models.video.r3d_18(),
    "efficientnet_b0": lambda: timm().create_model("efficientnet_b0"),
    "regnety_002": lambda: timm().create_model("regnety_002"),
}


SLOW_MODELS = [pytest.param(name, norm, marks=pytest.mark.slow) for name in MODELS for norm in ("gn", "frozen")]


@pytest.mark.parametrize(("name", "norm"), [*((name, "syncbn") for name in MODELS), *SLOW_MODELS])
def test_real_models_convert_completely_and_come_back(name, norm):
    model = MODELS[name]().eval()
    kinds = {n: type(m) for n, m in model.named_modules()}
    generator = torch.Generator().manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_(generator=generator)
            m.running_var.uniform_(0.5, 2, generator=generator)
    shape = (1, 3, 4, 32, 32) if name == "r3d_18" else (1, 3, 64, 64)
    x = torch.randn(shape, generator=generator)
    with torch.no_grad():
        wanted = model(x)
        parameters, keys = {n: id(p) for n, p in model.named_parameters()}, list(model.state_dict())
        options = {"num_groups": 8} if norm == "gn" else {}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            syncbn.convert(model, norm, **options)
        assert not [
            n for n, m in model.named_modules() if type(m).__name__.startswith(("BatchNorm", "SyncBatchNormAct."))
        ]
        assert {n: id(p) for n, p in model.named_parameters()} == parameters
        if norm != "gn":
            assert list(model.state_dict()) == keys
            converted = model(x)
        else:
            assert not [key for key in model.state_dict() if "running" in key or "tracked" in key]
            model(x)
        syncbn.revert(model)
        assert {n: type(m) for n, m in model.named_modules()} == kinds
        assert list(model.state_dict()) == keys
        actual = model(x)
    outputs = ("out",) if isinstance(wanted, dict) else (slice(None),)
    for key in outputs:
        assert torch.equal(actual[key], wanted[key])
        if norm != "gn":
            assert torch.equal(converted[key], wanted[key])


def test_fused_activation_is_kept_bit_for_bit():
    torch.manual_seed(0)
    fused = timm().layers.BatchNormAct2d(8).eval()
    x = torch.randn(2, 8, 4, 4)
    wanted = fused(x)
    syncbn.convert(fused)
    assert torch.equal(fused(x), wanted)
    assert isinstance(fused, SyncBatchNorm)
    assert (fused.train()(x) >= 0).all()
    syncbn.convert(fused, "gn", num_groups=4)
    torch.testing.assert_close(fused(x), nn.functional.group_norm(x, 4).relu())
    syncbn.revert(fused)
    assert type(fused) is timm().layers.BatchNormAct2d
    assert not fused._forward_hooks


def test_timm_sync_layer_converts_and_comes_back():
    model = timm().layers.convert_sync_batchnorm(nn.Sequential(timm().layers.BatchNormAct2d(8))).eval()
    kind = type(model[0])
    x = torch.randn(2, 8, 4, 4)
    syncbn.convert(model)
    assert (model.train()(x) >= 0).all()
    syncbn.revert(model)
    assert type(model[0]) is kind


class MyBatchNorm(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input) + 1


class MySyncBatchNorm(SyncBatchNorm):
    def forward(self, input):
        return super().forward(input) + 1


def test_an_unknown_subclass_is_left_alone_until_registered(monkeypatch):
    model = nn.Sequential(MyBatchNorm(3), nn.BatchNorm2d(3))
    with pytest.warns(UserWarning, match=r"left 0 alone: MyBatchNorm .* syncbn.register\(MyBatchNorm"):
        syncbn.convert(model)
    assert [type(m) for m in model] == [MyBatchNorm, SyncBatchNorm2d]
    monkeypatch.setattr(sys.modules["syncbn.conversion.classes"], "_REGISTERED", {})
    syncbn.register(MyBatchNorm, MySyncBatchNorm)
    syncbn.convert(model)
    assert isinstance(model[0], MySyncBatchNorm)
    assert isinstance(model[0], MyBatchNorm)
    assert model[0](torch.zeros(2, 3, 1, 1)).mean() == 1
    assert type(syncbn.revert(model)[0]) is MyBatchNorm
    with pytest.warns(UserWarning, match="more than normalize"):
        syncbn.convert(model, "gn", num_groups=3)
    with pytest.raises(ValueError, match=r"subclass of syncbn\.SyncBatchNorm"):
        syncbn.register(MyBatchNorm, nn.BatchNorm2d)


def test_frozen_batchnorm_is_listed_and_converted_on_request():
    frozen = torchvision().ops.FrozenBatchNorm2d(3)
    frozen.running_mean.fill_(0.5)
    frozen.weight.fill_(2)
    model, x = nn.Sequential(frozen, nn.BatchNorm2d(3)).eval(), torch.randn(2, 3, 4, 4)
    wanted, keys = model(x), set(model.state_dict())
    row = syncbn.plan(model)[0]
    assert (row.name, row.from_, row.to) == ("0", "FrozenBatchNorm2d", None)
    assert "include_frozen=True" in row.reason
    syncbn.convert(model)
    assert type(model[0]) is torchvision().ops.FrozenBatchNorm2d
    syncbn.convert(model, include_frozen=True)
    assert type(model[0]) is SyncBatchNorm2d
    assert model[0].weight.requires_grad
    torch.testing.assert_close(model(x), wanted)
    (model.train()(x) ** 2).sum().backward()
    assert model[0].running_mean[0] != 0.5
    syncbn.convert(model, process_group=1)
    assert model[0].process_group == 1
    syncbn.convert(model, "gn", num_groups=3)
    assert [type(m) for m in model] == [SyncBatchNorm2d, nn.GroupNorm]
    syncbn.revert(model)
    assert type(model[0]) is torchvision().ops.FrozenBatchNorm2d
    assert set(model.state_dict()) == keys
    assert not list(model[0].parameters())
    assert list(model[0].state_dict()) == list(torchvision().ops.FrozenBatchNorm2d(3).state_dict())


def test_groupnorm_leaves_no_statistics_and_revert_restores_them():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, eps=1e-3))
    model(torch.randn(4, 3, 2, 2))
    weight, statistics = model[1].weight, copy.deepcopy(dict(model[1].named_buffers()))
    syncbn.convert(model, "gn", num_groups=4)
    assert type(model[1]) is nn.GroupNorm
    assert (model[1].num_groups, model[1].eps) == (4, 1e-3)
    assert list(model[1].state_dict()) == ["weight", "bias"]
    assert model[1].weight is weight
    syncbn.convert(model, "gn", num_groups=4)  # again: nothing changes
    syncbn.convert(model, "gn", num_groups=2)  # other words: built anew from the original
    assert model[1].num_groups == 2
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    syncbn.convert(model, "syncbn")
    assert type(model[1]) is SyncBatchNorm2d
    for m in (model, copied):
        syncbn.revert(m)
        assert type(m[1]) is nn.BatchNorm2d
        assert not hasattr(m[1], "num_groups")
        torch.testing.assert_close(dict(m[1].named_buffers()), statistics, rtol=0, atol=0)


def test_statistics_follow_the_dtype_of_a_model_cast_in_between():
    layer = syncbn.convert(nn.BatchNorm2d(8), "gn", num_groups=4).double()
    assert syncbn.revert(layer).running_mean.dtype == torch.float64


def test_without_parameters_and_without_bias():
    plain = syncbn.convert(nn.BatchNorm2d(4, affine=False), "gn", num_groups=2)
    assert plain.weight is None
    assert plain(torch.randn(2, 4, 2, 2)).shape == (2, 4, 2, 2)
    assert syncbn.revert(plain).affine is False
    no_bias = syncbn.convert(torch_norm(nn.BatchNorm2d, 4, bias=False), "gn", num_groups=2)
    assert no_bias.bias is None
    assert type(syncbn.revert(no_bias)) is nn.BatchNorm2d


def test_bn_stops_synchronizing():
    model = nn.Sequential(nn.BatchNorm1d(3), SyncBatchNorm(3, process_group=2), nn.SyncBatchNorm(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        syncbn.convert(model, "bn")
    assert type(model[0]) is nn.BatchNorm1d
    assert [m.process_group for m in model[1:]] == [1, 1]
    syncbn.convert(model, "bn")
    syncbn.convert(model, "syncbn")
    assert [m.process_group for m in model] == [None, 2, None]
    syncbn.revert(syncbn.convert(model, "bn"))
    assert model[1].process_group == 2
    assert [type(m) for m in model] == [nn.BatchNorm1d, SyncBatchNorm, nn.SyncBatchNorm]


def test_a_layer_parametrized_after_conversion_is_not_reverted():
    model = syncbn.convert(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)))
    parametrize.register_parametrization(model[1], "weight", Doubled())
    with pytest.raises(ValueError, match="class of 1 was changed after conversion"):
        syncbn.revert(model)
    assert type(model[0]) is SyncBatchNorm1d


def test_what_was_written_as_syncbatchnorm_stays_unless_asked():
    model = nn.Sequential(SyncBatchNorm(3), SyncBatchNorm(3))
    syncbn.revert(model)
    assert type(model[0]) is SyncBatchNorm
    model[0](torch.randn(2, 3, 4))
    keys = list(model.state_dict())
    syncbn.revert(model, as_batchnorm=True)
    assert [type(m) for m in model] == [nn.BatchNorm1d, nn.BatchNorm2d]
    assert list(model.state_dict()) == keys


def test_plan_touches_nothing_and_says_why():
    model = small()
    before = {n: type(m) for n, m in model.named_modules()}
    rows = syncbn.plan(model, exclude=["head.again.*"])
    assert {n: type(m) for n, m in model.named_modules()} == before
    assert rows[0] == ("stem.1", "BatchNorm2d", "SyncBatchNorm2d", "synchronizes")
    assert rows[1] == ("head.again.1", "BatchNorm2d", None, "excluded by 'head.again.*'")
    assert syncbn.plan(model, "gn", num_groups=3)[0].reason.startswith("num_groups=3 does not divide its 4 channels")
    assert syncbn.plan(nn.LazyBatchNorm2d())[0].to is None


def test_include_and_exclude():
    model = small()
    syncbn.convert(model, include=["head.*"], exclude=["*.again.*"])
    assert type(model.stem[1]) is SyncBatchNorm2d  # under its other name, head.bn
    assert type(model.head["again"][1]) is nn.BatchNorm2d
    with pytest.raises(ValueError, match=r"write \['head'\]"):
        syncbn.convert(model, include="head")


def test_converting_nothing_is_a_warning():
    with pytest.warns(UserWarning, match="found no layer to convert"):
        syncbn.convert(nn.Linear(2, 2))


def test_convert_sync_batchnorm_is_the_same_call():
    model = SyncBatchNorm.convert_sync_batchnorm(small(), 2)
    assert model.stem[1].process_group == 2


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def parametrized():
    layer = nn.BatchNorm2d(3)
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


def patched():
    layer = nn.BatchNorm2d(3)
    layer.forward = lambda x: nn.BatchNorm2d.forward(layer, x)
    return layer


def compiled_in_place():
    model = nn.Sequential(nn.BatchNorm2d(3))
    model.compile()
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.LazyBatchNorm2d(), "run one batch first"),
        (parametrized, "remove_parametrizations"),
        (patched, "set on the instance"),
        (lambda: nn.DataParallel(nn.BatchNorm2d(3)), "already wrapped by DataParallel.*convert, then compile"),
        (lambda: torch.compile(nn.BatchNorm2d(3)), "already wrapped by OptimizedModule"),
        (compiled_in_place, r"already wrapped by torch.compile"),
    ],
)
def test_errors_come_before_anything_is_touched(make, message):
    model = nn.Sequential(nn.BatchNorm2d(3), make())
    for norm, options in (("syncbn", {}), ("gn", {"num_groups": 3})):
        with pytest.raises(ValueError, match=f"(?s)1.*{message}"):
            syncbn.convert(model, norm, **options)
        assert type(model[0]) is nn.BatchNorm2d
    assert any(row.to is None and row.name.startswith("1") for row in syncbn.plan(model))


def test_wrapped_models_with_nothing_left_to_convert_are_fine():
    model = torch.compile(syncbn.convert(nn.Sequential(nn.BatchNorm2d(4))))
    assert syncbn.convert(model) is model
    with pytest.raises(ValueError, match="already wrapped"):
        syncbn.convert(model, "gn", num_groups=2)
    with pytest.raises(ValueError, match="already wrapped"):
        syncbn.convert(model, process_group=1)


@pytest.mark.parametrize(
    ("norm", "options", "message"),
    [
        ("batch", {}, "unknown norm 'batch': expected one of bn, syncbn, brn"),
        ("gn", {"num_groups": 3}, r"(?s)1: num_groups=3 does not divide its 4 channels; choose one of \[1, 2, 4\]"),
        ("gn", {"groups": 2}, "'gn' takes num_groups, channels_per_group, not groups"),
        ("syncbn", {"num_groups": 2}, "'syncbn' takes no keyword arguments, not num_groups"),
        ("gn", {"num_groups": 2, "process_group": 2}, "process_group belongs to norms that synchronize"),
        ("syncbn", {"process_group": "host"}, "process_group: expected None"),
    ],
)
def test_unusable_arguments(norm, options, message):
    model = nn.Sequential(nn.BatchNorm2d(6), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match=message):
        syncbn.convert(model, norm, **options)
    assert [type(m) for m in model] == [nn.BatchNorm2d] * 2


@pytest.mark.parametrize("norm", ["gn", "none", "bn"])
def test_the_group_of_a_torch_layer_comes_back_after_another_norm(run, norm):
    assert run(group_after, 2, norm) == [[0, 1]] * 2


def group_after(rank, world_size, norm):
    group = torch.distributed.new_group([0, 1])
    layer = nn.SyncBatchNorm(4, process_group=group)
    syncbn.convert(layer, norm, **({"num_groups": 2} if norm == "gn" else {}))
    syncbn.convert(layer)
    assert layer.process_group is group
    torch.distributed.barrier()  # nobody leaves while others still connect
    return torch.distributed.get_process_group_ranks(layer.process_group)


def test_a_layer_written_to_synchronize_runs_in_groups_of_one():
    x = torch.randn(4, 3)
    for layer in (syncbn.convert(SyncBatchNorm(3), "bn"), syncbn.convert(SyncBatchNorm(3), process_group=1)):
        torch.testing.assert_close(layer(x), nn.BatchNorm1d(3)(x))
        assert type(syncbn.revert(layer)) is SyncBatchNorm
