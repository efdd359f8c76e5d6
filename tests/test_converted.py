"""The classes of converted layers: found as the class that was written, and as SyncBatchNorm; they copy and pickle."""

import abc
import copy
import io
import pickle
import re
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

import syncbn
from syncbn import SyncBatchNorm
from syncbn.conversion import classes
from syncbn.nn.converted import SyncBatchNorm2d, class_of_both


@pytest.fixture(autouse=True)
def registered_here_alone(monkeypatch):
    monkeypatch.setattr(classes, "_REGISTERED", {})


def fused(num_features=4):
    from timm.layers import BatchNormAct2d

    return BatchNormAct2d(num_features)


def test_lists_of_torchs_classes_find_converted_layers():
    norms = tuple(value for name, value in vars(nn).items() if "Norm" in name)
    make = lambda: nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2))  # noqa: E731
    model = syncbn.convert(make())
    assert [isinstance(layer, norms) for layer in model] == [True, True, True, False]
    for layer, written in zip(model[:3], make(), strict=False):
        assert isinstance(layer, type(written))
        assert isinstance(layer, SyncBatchNorm)
        assert not isinstance(layer, nn.SyncBatchNorm)
        names = {cls.__name__ for cls in (type(layer), *type(layer).__bases__)}
        assert {"_BatchNorm", type(written).__name__} <= names  # of the class and its direct bases, as mmengine asks


@pytest.mark.parametrize("layer", ["BatchNorm2d", "_BatchNorm"])
def test_mmengines_init_cfg_finds_them(layer):
    pytest.importorskip("mmengine", reason="mmengine is not installed")
    from mmengine.model import initialize

    model = syncbn.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    initialize(model, {"type": "Constant", "val": 0.25, "bias": 0.75, "layer": layer})
    assert (model[1].weight == 0.25).all()
    assert (model[1].bias == 0.75).all()


def test_ours_are_told_from_torchs_in_print():
    model = syncbn.convert(nn.Sequential(nn.BatchNorm2d(2), nn.SyncBatchNorm(2), fused(), SyncBatchNorm(2)))
    shown = re.findall(r"syncbn\.\w+", str(model))
    assert shown == [
        f"syncbn.{name}" for name in ("SyncBatchNorm2d", "SyncBatchNorm", "SyncBatchNormAct2d", "SyncBatchNorm")
    ]


def test_a_fused_layer_is_timms_and_ours():
    layer = syncbn.convert(fused())
    assert isinstance(layer, type(fused()))
    assert isinstance(layer, SyncBatchNorm)
    assert type(layer) is type(syncbn.convert(fused()))
    assert type(layer).__name__ == "SyncBatchNormAct2d"
    assert syncbn.plan(fused())[0].to == "SyncBatchNormAct2d"
    assert isinstance(type(layer)(3, act_layer=nn.SiLU).act, nn.SiLU)  # who calls the class gets what the class makes
    assert type(layer)(3, process_group=2).process_group == 2


COPIES = {
    "deepcopy": copy.deepcopy,
    **{f"pickle {n}": lambda x, n=n: pickle.loads(pickle.dumps(x, n)) for n in range(6)},
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize(
    "make", [lambda: nn.BatchNorm2d(4), fused, lambda: Mine(4)], ids=["torch", "timm", "registered"]
)
def test_copies_are_of_the_same_class_and_revert(make, how):
    syncbn.register(Mine, SyncMine)
    layer = syncbn.convert(make(), process_group=2).eval()
    other = COPIES[how](layer)
    x = torch.randn(2, 4, 3, 3)
    assert type(other) is type(layer)
    assert torch.equal(other(x), layer(x))
    assert other.process_group == 2
    assert COPIES[how](type(layer)) is type(layer)
    assert type(syncbn.revert(other)) is type(make())


LOAD = """
import io, sys, torch
layer = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=False)
import syncbn
from timm.layers import BatchNormAct2d
assert isinstance(layer, BatchNormAct2d) and isinstance(layer, syncbn.SyncBatchNorm)
assert type(layer) is type(syncbn.convert(BatchNormAct2d(1)))
assert type(syncbn.revert(layer)) is BatchNormAct2d
"""
LOAD_WITHOUT = """
import io, sys, torch
sys.modules["syncbn"] = None  # as where it is not installed
model = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=False)
assert [type(m).__module__ for m in model] == ["timm.layers.norm_act", "torch.nn.modules.batchnorm"], model
"""


def saved(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    return stream.getvalue()


@pytest.mark.slow
def test_another_process_loads_a_converted_layer():
    subprocess.run([sys.executable, "-c", LOAD], input=saved(syncbn.convert(fused())), check=True)


@pytest.mark.slow
def test_a_reverted_copy_loads_without_syncbn():
    model = syncbn.convert(nn.Sequential(fused(), nn.BatchNorm2d(4)))
    model(torch.randn(2, 4, 3, 3))
    syncbn.freeze(model)
    syncbn.unfreeze(model)
    subprocess.run([sys.executable, "-c", LOAD_WITHOUT], input=saved(syncbn.revert(copy.deepcopy(model))), check=True)
    assert isinstance(model[0], SyncBatchNorm)


def sent(rank, world_size, model):
    return model, [isinstance(layer, SyncBatchNorm) for layer in model]


def test_converted_models_travel_to_other_processes_and_back(run):
    model = syncbn.convert(nn.Sequential(nn.BatchNorm2d(4), fused()))
    for back, is_ours in run(sent, 2, model):
        assert is_ours == [True, True]
        assert [type(layer) for layer in back] == [type(layer) for layer in model]


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def test_classes_that_torch_derives_are_their_own():
    """torch.nn.utils.parametrize makes a subclass that refuses to be pickled, as it does of any class."""
    layer = syncbn.convert(fused())
    parametrize.register_parametrization(layer, "weight", Doubled())
    assert isinstance(layer, type(fused()))
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(layer)
    copied = copy.deepcopy(layer)
    assert parametrize.is_parametrized(copied)


def compiled(rank, world_size):
    torch._dynamo.reset()
    layer = syncbn.convert(nn.Sequential(fused(), nn.BatchNorm2d(4)))
    x = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(rank))
    eager = copy.deepcopy(layer)(x)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), eager)


@pytest.mark.slow
def test_they_compile_into_one_graph(run):
    run(compiled, 2, timeout=300)


class Mine(nn.BatchNorm2d):
    """With all that a subclass may have beside its forward."""

    kind = "mine"

    def __init__(self, num_features, scale=2):
        super().__init__(num_features, eps=1e-3)
        self.scale = scale

    def _check_input_dim(self, input):
        super()._check_input_dim(input)
        if input.shape[-1] == 7:
            raise ValueError("seven is refused")

    def reset_parameters(self):
        super().reset_parameters()
        nn.init.constant_(self.weight, 0.5)

    def extra_repr(self):
        return f"{super().extra_repr()}, mine"

    def doubled(self):
        return 2 * self.scale

    @property
    def name(self):
        return f"{self.kind} of {self.num_features}"

    def __getstate__(self):
        return {**self.__dict__, "was_copied": True}


class SyncMine(SyncBatchNorm):
    def forward(self, input):
        return super().forward(input) + self.scale


def test_a_registered_class_keeps_its_attributes_and_methods():
    syncbn.register(Mine, SyncMine)
    layer = syncbn.convert(Mine(4, scale=3))
    assert type(layer).__name__ == "SyncMine"
    assert isinstance(layer, Mine)
    assert isinstance(layer, SyncMine)
    assert (layer.kind, layer.doubled(), layer.name) == ("mine", 6, "mine of 4")
    assert str(layer).endswith("mine)")
    assert copy.deepcopy(layer).was_copied
    torch.testing.assert_close(layer(torch.randn(8, 4, 2, 2)).mean(), torch.tensor(3.0))
    for shape, message in (((2, 4), "4D"), ((2, 4, 1, 7), "seven")):
        with pytest.raises(ValueError, match=message):
            layer(torch.randn(shape))
    layer.reset_parameters()
    assert (layer.weight == 0.5).all()
    assert type(syncbn.revert(layer)) is Mine
    assert layer.doubled() == 6


class Both(SyncBatchNorm, Mine):
    def forward(self, input):
        return super().forward(input) + self.scale


def test_a_class_that_is_both_already_is_used_itself():
    syncbn.register(Mine, Both)
    assert type(syncbn.convert(Mine(4))) is Both


class Abstract(nn.BatchNorm2d, abc.ABC):
    """Another metaclass."""


class Meta(type):
    def __call__(cls, *args, **options):
        made = super().__call__(*args, **options)
        made.was_called = True
        return made


class WithMeta(nn.BatchNorm2d, metaclass=Meta):
    pass


class Slots(nn.BatchNorm2d):
    __slots__ = ("extra",)


class Mixin:
    pass


class Mixed(Mixin, nn.BatchNorm2d):
    pass


@pytest.mark.parametrize("cls", [Abstract, WithMeta, Slots, Mixed])
def test_unusual_classes_convert(cls):
    syncbn.register(cls)
    layer, x = cls(3).eval(), torch.randn(2, 3, 4, 4)
    expected = layer(x)
    if cls is Slots:
        layer.extra = 1
    assert syncbn.plan(layer)[0].reason == "synchronizes"
    syncbn.convert(layer)
    assert isinstance(layer, cls)
    assert isinstance(layer, SyncBatchNorm)
    assert type(layer).forward is SyncBatchNorm.forward
    assert torch.equal(layer(x), expected)
    assert cls is Slots or type(copy.deepcopy(layer)) is type(layer)  # torch's modules with slots do not copy
    assert type(syncbn.revert(layer)) is cls
    assert cls is not Slots or layer.extra == 1


class Reduced(nn.BatchNorm2d):
    def __reduce__(self):
        return Reduced, (self.num_features,), self.__dict__


class Copied(nn.BatchNorm2d):
    def __deepcopy__(self, memo):
        return Copied(self.num_features)


class Last(nn.BatchNorm2d):
    def __init_subclass__(cls):
        raise TypeError("Last has no subclasses")


class SyncMixed(Mixin, SyncBatchNorm):
    """Its base comes behind Mixed in any class of both, and would take SyncBatchNorm with it."""


@pytest.mark.parametrize(
    ("cls", "sync_class", "reason"),
    [
        (Reduced, SyncBatchNorm, "its own __reduce__"),
        (Copied, SyncBatchNorm, "its own __deepcopy__"),
        (Last, SyncBatchNorm, "Last has no subclasses"),
        (Mixed, SyncMixed, "before SyncBatchNorm"),
    ],
)
def test_where_no_class_can_be_both_the_plan_says_so(cls, sync_class, reason):
    syncbn.register(cls, sync_class)
    layer = cls(3)
    row = syncbn.plan(layer)[0]
    assert row.to == sync_class.__name__
    assert row.reason.startswith(f"synchronizes, as a {sync_class.__name__} that is no {cls.__name__}: ")
    assert reason in row.reason
    syncbn.convert(layer)
    assert type(layer) is sync_class
    assert type(copy.deepcopy(layer)) is sync_class
    assert type(pickle.loads(pickle.dumps(layer))) is sync_class
    assert type(syncbn.revert(layer)) is cls


class LastWithSlots(Slots):
    __init_subclass__ = Last.__init_subclass__


def test_what_cannot_change_its_class_is_refused_and_nothing_is_touched():
    syncbn.register(LastWithSlots)
    model = nn.Sequential(nn.BatchNorm2d(4), LastWithSlots(4))
    for norm, options in (("syncbn", {}), ("gn", {"num_groups": 2})):
        with pytest.raises(ValueError, match=r"1: an object of LastWithSlots cannot become .* use exclude"):
            syncbn.convert(model, norm, **options)
        assert type(model[0]) is nn.BatchNorm2d


def test_classes_of_a_function_convert_and_do_not_pickle_as_before():
    class Local(nn.BatchNorm2d):
        pass

    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(Local(2))
    syncbn.register(Local)
    layer = syncbn.convert(Local(2))
    assert isinstance(copy.deepcopy(layer), Local)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(layer)


def test_layers_of_torchs_own_sync_class_never_stay_one():
    from timm.layers import BatchNormAct2d, convert_sync_batchnorm

    model = convert_sync_batchnorm(nn.Sequential(BatchNormAct2d(4), nn.BatchNorm2d(4)))
    kinds = [type(layer) for layer in model]
    syncbn.convert(model)
    assert [type(layer).__name__ for layer in model] == ["SyncBatchNormAct", "SyncBatchNorm"]
    assert not any(isinstance(layer, nn.SyncBatchNorm) for layer in model)
    assert [type(layer) for layer in syncbn.revert(model)] == kinds


def test_what_others_make_by_the_class_of_a_layer():
    """``type(layer)(...)`` is a layer that was written to synchronize; revert(as_batchnorm=True) knows it."""
    layer = syncbn.convert(nn.Sequential(nn.BatchNorm2d(3)))
    layer.append(type(layer[0])(5))
    assert type(syncbn.revert(layer)[1]) is SyncBatchNorm2d
    assert [type(part) for part in syncbn.revert(layer, as_batchnorm=True)] == [nn.BatchNorm2d] * 2
    assert syncbn.plan(SyncBatchNorm2d(4), "gn", num_groups=2)[0].reason == "replaced"


def test_unknown_names_are_no_classes():
    import syncbn.nn.converted as module

    for name in ("SyncNothing", "Sync[a:b]", "SyncBatchNorm4d"):
        assert not hasattr(module, name)
    made, why = class_of_both(SyncBatchNorm, nn.SyncBatchNorm)
    assert (made, why) == (SyncBatchNorm, None)


def test_fusing_with_a_convolution():
    """torch.nn.utils.fusion takes a converted layer as it is; torch.ao wants the class itself, so revert first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    model(torch.randn(4, 3, 2, 2))
    model.eval()
    x = torch.randn(2, 3, 5, 5)
    expected = nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1])(x)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.ao.quantization is deprecated", DeprecationWarning)
        quantized = torch.ao.quantization.fuse_modules(model, [["0", "1", "2"]])(x)
        syncbn.convert(model)
        assert torch.equal(nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1])(x), expected)
        syncbn.revert(model)
        assert torch.equal(torch.ao.quantization.fuse_modules(model, [["0", "1", "2"]])(x), quantized)
    assert isinstance(model[1], _BatchNorm)
