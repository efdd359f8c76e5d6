"""Modules with statistics that are no BatchNorm of torch: frozen ones, foreign ones, and the parts of unknown ones."""

import warnings

import pytest
import torch
from torch import nn

import syncbn
from syncbn import SyncBatchNorm
from syncbn.nn.converted import SyncBatchNorm1d, SyncBatchNorm2d


def torchvision_frozen(num=3, eps=1e-3):
    import torchvision

    return torchvision.ops.FrozenBatchNorm2d(num, eps)


class Renamed:
    """A subclass of torchvision's by a name that says nothing."""

    def __new__(cls):
        import torchvision

        return type("Still", (torchvision.ops.FrozenBatchNorm2d,), {})(3)


class Buffers(nn.Module):
    """The form that all of them have: no parameters, eps written into the forward, as transformers' and others' do."""

    written = 1e-5

    def __init__(self, num=3):
        super().__init__()
        for name, start in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num,), start))

    def forward(self, x):
        shape = 1, -1, *[1] * (x.dim() - 2)
        scale = (self.weight * (self.running_var + self.written).rsqrt()).reshape(shape)
        return x * scale + (self.bias.reshape(shape) - self.running_mean.reshape(shape) * scale)


class DetrFrozenBatchNorm2d(Buffers):
    """As transformers names them."""


class LargeEps(Buffers):
    written = 3e-3


class NoEps(Buffers):
    written = 0.0


class AffineLayer1d(Buffers):
    def forward(self, x):
        if x.dim() != 2:
            raise ValueError("2D")
        return super().forward(x)


class DetectronFrozenBatchNorm2d(Buffers):
    """detectron2's has eps and a buffer that is None."""

    def __init__(self, num=3, eps=1e-4):
        super().__init__(num)
        self.num_features, self.eps = num, eps
        self.register_buffer("num_batches_tracked", None)

    @property
    def written(self):
        return self.eps


def transformers_frozen():
    modeling = pytest.importorskip("transformers.models.detr.modeling_detr", reason="transformers is not installed")
    return modeling.DetrFrozenBatchNorm2d(3)


OF_PACKAGES = [torchvision_frozen, transformers_frozen]
FROZEN = [*OF_PACKAGES, Renamed, DetrFrozenBatchNorm2d, DetectronFrozenBatchNorm2d, Buffers, LargeEps]


def fill(layer):
    generator = torch.Generator().manual_seed(0)
    for name, buffer in layer.named_buffers():
        buffer.copy_(torch.rand(3, generator=generator) * (1e-2 if name == "running_var" else 1) + 1e-3)
    return layer.eval()


@pytest.mark.parametrize("make", FROZEN)
def test_frozen_layers_by_name_base_and_kind(make):
    layer, x = fill(make()), torch.randn(4, 3, 5, 5)
    expected, kind, attributes = layer(x), type(layer), set(vars(layer))
    state, buffers = {k: v.clone() for k, v in layer.state_dict().items()}, dict(layer._buffers)
    model = nn.Sequential(layer, nn.BatchNorm2d(3))
    (row, _) = syncbn.plan(model)
    assert (row.from_, row.to) == (kind.__name__, None)
    assert "include_frozen=True" in row.reason
    assert type(syncbn.convert(model)[0]) is kind
    syncbn.convert(model, include_frozen=True)
    assert isinstance(layer, SyncBatchNorm)
    assert isinstance(layer, nn.BatchNorm2d) is ("2d" in "".join(cls.__name__ for cls in kind.__mro__))
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert sum(p.requires_grad for p in layer.parameters()) == 2
    syncbn.revert(model)
    assert type(layer) is kind
    assert set(vars(layer)) == attributes
    assert torch.equal(layer(x), expected)
    assert list(layer._buffers) == list(buffers)
    assert [b is None for b in layer._buffers.values()] == [b is None for b in buffers.values()]
    torch.testing.assert_close(layer.state_dict(), state, rtol=0, atol=0)


def test_a_frozen_layer_without_eps_and_of_one_dimension():
    layer, x = fill(NoEps()), torch.randn(4, 3, 5, 5)
    expected = layer(x)
    torch.testing.assert_close(syncbn.convert(layer, include_frozen=True)(x), expected, rtol=1e-5, atol=1e-5)
    assert 0 < layer.eps < 1e-10  # torch refuses 0 in training
    assert torch.isfinite(layer.train()(x)).all()
    layer, x = fill(AffineLayer1d()), torch.randn(4, 3)
    expected = layer(x)
    assert type(syncbn.convert(layer, include_frozen=True)) is SyncBatchNorm1d
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


class FrozenThenRelu(Buffers):
    def forward(self, x):
        return super().forward(x).relu()


def test_a_frozen_layer_that_does_more_stays():
    model = nn.Sequential(FrozenThenRelu(), nn.BatchNorm2d(3))
    with pytest.warns(UserWarning, match="left 0 alone: FrozenThenRelu does more than normalize"):
        syncbn.convert(model, include_frozen=True)
    assert [type(layer) for layer in model] == [FrozenThenRelu, SyncBatchNorm2d]


def test_timms_frozen_fused_layer_becomes_its_trained_class():
    from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d

    layer, x = fill(FrozenBatchNormAct2d(3)), torch.randn(4, 3, 5, 5)
    expected = layer(x)
    syncbn.convert(layer, include_frozen=True)
    assert isinstance(layer, BatchNormAct2d)
    assert type(layer).__name__ == "SyncBatchNormAct2d"
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert type(syncbn.revert(layer)) is FrozenBatchNormAct2d
    assert torch.equal(layer(x), expected)


def hetero():
    norms = pytest.importorskip("torch_geometric.nn.norm", reason="torch_geometric is not installed")
    return norms.HeteroBatchNorm(3, num_types=2)


class Renormalization(nn.Module):
    """Another kind, with a BatchNorm inside."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_std", torch.ones(3))
        self.inner = nn.BatchNorm1d(3)


def instance_norm():
    return nn.InstanceNorm2d(3, track_running_stats=True)


@pytest.mark.parametrize("make", [hetero, Renormalization, instance_norm])
def test_foreign_statistics_are_a_row_and_a_warning(make):
    model = nn.Sequential(make(), nn.BatchNorm1d(3))
    name = type(model[0]).__name__
    row = syncbn.plan(model)[0]
    assert (row.name, row.from_, row.to) == ("0", name, None)
    assert "no subclass of torch's BatchNorm" in row.reason
    with pytest.warns(UserWarning, match=f"left 0 alone: {name} keeps running statistics"):
        syncbn.convert(model)
    assert not isinstance(model[0], SyncBatchNorm)
    assert not hasattr(model[0], "inner") or type(model[0].inner) is SyncBatchNorm1d
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        syncbn.convert(syncbn.revert(model), exclude=["0"])
        assert "excluded" in syncbn.plan(model, exclude=["0"])[0].reason
        syncbn.convert(model, "gn", num_groups=3, include=["1"])


def test_many_foreign_layers_are_one_warning():
    model = nn.Sequential(instance_norm(), nn.BatchNorm2d(3), instance_norm())
    with pytest.warns(UserWarning, match="left 0, 2 alone") as caught:
        syncbn.convert(model)
    assert len(caught) == 1


def test_modules_without_statistics_have_no_row():
    layers = [nn.GroupNorm(1, 3), nn.LayerNorm(3), nn.InstanceNorm2d(3), nn.Linear(3, 3), nn.BatchNorm2d(3)]
    assert [row.name for row in syncbn.plan(nn.Sequential(*layers))] == ["4"]
    frozen = syncbn.convert(nn.Sequential(nn.BatchNorm2d(3)), "frozen")
    assert [row.reason for row in syncbn.plan(frozen)] == ["synchronizes"]


def test_what_is_said_when_nothing_was_found_is_true():
    with pytest.warns(UserWarning, match="this Linear has no BatchNorm layer"):
        syncbn.convert(nn.Linear(2, 2))
    assert syncbn.plan(nn.Linear(2, 2)) == []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        syncbn.convert(nn.Sequential(instance_norm()))
    assert ["left 0 alone" in str(w.message) for w in caught] == [True, False]
    assert str(caught[1].message).endswith("syncbn.plan(model) lists why.")
    assert len(syncbn.plan(nn.Sequential(instance_norm()))) == 1


def splits():
    from timm.layers.split_batchnorm import SplitBatchNorm2d

    return nn.Sequential(nn.BatchNorm2d(4), SplitBatchNorm2d(4, num_splits=2))


@pytest.mark.parametrize("norm", ["syncbn", "gn"])
def test_an_unknown_layer_stays_with_all_its_parts(norm):
    model, options = splits(), {"num_groups": 2} if norm == "gn" else {}
    rows = {row.name: row for row in syncbn.plan(model, norm, **options)}
    assert rows["1.aux_bn.0"].to is None
    assert "belongs to 1 (SplitBatchNorm2d), which stays" in rows["1.aux_bn.0"].reason
    with pytest.warns(UserWarning, match="left 1 alone: SplitBatchNorm2d") as caught:
        syncbn.convert(model, norm, **options)
    assert len(caught) == 1
    assert type(model[1].aux_bn[0]) is nn.BatchNorm2d
    syncbn.revert(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        syncbn.convert(model, norm, exclude=["1"], **options)
    assert type(model[1].aux_bn[0]) is nn.BatchNorm2d
    assert type(model[0]) is not nn.BatchNorm2d


def test_the_parts_of_a_registered_layer_convert(monkeypatch):
    monkeypatch.setattr(syncbn.conversion.classes, "_REGISTERED", {})
    model = splits()
    syncbn.register(type(model[1]))
    syncbn.convert(model)
    assert [isinstance(m, SyncBatchNorm) for m in (model[1], model[1].aux_bn[0])] == [True, True]


def test_mmengines_sync_layer_only_normalizes():
    parrots = pytest.importorskip("mmengine.utils.dl_utils.parrots_wrapper", reason="mmengine is not installed")
    from mmengine.model.utils import revert_sync_batchnorm

    layer = parrots.SyncBatchNorm(3)
    syncbn.convert(layer)
    assert type(layer) is SyncBatchNorm
    assert layer(torch.randn(4, 3)).shape == (4, 3)
    assert type(syncbn.revert(layer)) is parrots.SyncBatchNorm
    plain = revert_sync_batchnorm(nn.Sequential(nn.SyncBatchNorm(3)))
    kind = type(plain[0])
    syncbn.convert(plain)
    assert isinstance(plain[0], kind)
    assert isinstance(plain[0], SyncBatchNorm)
    assert plain(torch.randn(4, 3)).shape == (4, 3)
