"""Norms "brn" and "sn" in conversion: there and back, groups, errors, and models in DDP."""

import copy
import pickle
import warnings

import pytest
import torch
from test_norms import LAYERS, filled
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn

KINDS = {"brn": syncbn.BatchRenorm, "sn": syncbn.SwitchableNorm}
OF_SN = ["mean_weight", "var_weight"]


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}], ids=["affine", "plain", "no bias"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("norm", KINDS)
def test_there_and_back(norm, kind, options):
    cls, shape = LAYERS[kind]
    layer = filled(cls, **options)
    attributes, before = set(vars(layer)), copy.deepcopy(layer.state_dict())
    tensors = {name: id(tensor) for name, tensor in layer.state_dict(keep_vars=True).items()}
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 3 + 1
    evaluated = copy.deepcopy(layer).eval()(x)

    syncbn.convert(layer, norm)
    assert type(layer) is KINDS[norm]
    assert (layer.eps, layer.momentum) == (0.01, 0.1)
    state = layer.state_dict(keep_vars=True)
    assert {name: id(state[name]) for name in tensors} == tensors
    assert state.keys() - tensors.keys() == set(OF_SN if norm == "sn" else [])
    if norm == "brn":
        torch.testing.assert_close(copy.deepcopy(layer).eval()(x), evaluated)
    layer.eval()(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other.train()(x), copy.deepcopy(layer).train()(x), rtol=0, atol=0)
        assert syncbn.plan(other, norm)[0].reason == "already"
        assert type(syncbn.revert(other)) is cls

    syncbn.revert(layer)
    assert type(layer) is cls
    assert set(vars(layer)) - {"_last_dims"} == attributes
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(layer(x), evaluated)
    layer.train()(x)


def small():
    return nn.Sequential(nn.Conv2d(3, 6, 1), filled(nn.BatchNorm2d), nn.ReLU(), filled(nn.BatchNorm2d))


@pytest.mark.parametrize("norm", KINDS)
def test_plan_filters_groups_and_other_norms(norm):
    model = small()
    name = KINDS[norm].__name__
    wanted = [("1", "BatchNorm2d", name, "replaced"), ("3", "BatchNorm2d", None, "excluded by '3'")]
    assert syncbn.plan(model, norm, exclude=["3"], process_group=2) == wanted
    assert type(model[1]) is nn.BatchNorm2d
    syncbn.convert(model, norm, exclude=["3"], process_group=2)
    assert model[1].process_group == 2
    assert syncbn.plan(model, norm, process_group=2)[0].reason == "already"
    assert syncbn.plan(model, norm, process_group="node")[0].reason == "replaced"
    assert pickle.loads(pickle.dumps(model))[1].process_group == 2
    assert name in str(syncbn.audit(model, torch.randn(4, 3, 2, 2), per_rank_batch_size=1, world_size=2))
    for other, options in (
        ("gn", {"num_groups": 2}),
        ("sn", {}),
        ("brn", {}),
        ("syncbn", {}),
        (norm, {}),
        ("frozen", {}),
    ):
        syncbn.convert(model, other, **options)
    syncbn.convert(model, "bn")
    torch.testing.assert_close(model.state_dict(), small().state_dict() | model[0].state_dict(prefix="0."))
    assert vars(model[1]).keys() == vars(small()[1]).keys()


SYNCHRONIZED = {"syncbn": {}, "brn": {}, "sn": {}, "evonorm_b0": {}, "wn": {"mean_only": True}}


@pytest.mark.parametrize("norm", SYNCHRONIZED)
@pytest.mark.parametrize("first", SYNCHRONIZED)
def test_without_a_group_a_layer_keeps_the_one_it_has(first, norm):
    for layer in (nn.BatchNorm2d(6), nn.SyncBatchNorm(6), syncbn.SyncBatchNorm(6, process_group=4)):
        model, written = nn.Sequential(nn.Conv2d(3, 6, 1), layer, nn.ReLU()), getattr(layer, "process_group", None)
        syncbn.convert(model, first, **SYNCHRONIZED[first], process_group=2)
        row = syncbn.plan(model, norm, **SYNCHRONIZED[norm])[0]
        assert (row.reason == "already") == (norm == first)
        syncbn.convert(model, norm, **SYNCHRONIZED[norm])
        assert (type(layer).__name__, layer.process_group) == (row.to, 2)
        for group in (None, 2):
            assert syncbn.plan(model, norm, **SYNCHRONIZED[norm], process_group=group)[0].reason == "already"
        syncbn.convert(model, norm, **SYNCHRONIZED[norm], process_group="node")
        assert layer.process_group == "node"
        syncbn.convert(
            syncbn.convert(model, "bn"), norm, **SYNCHRONIZED[norm]
        )  # "bn" stops it, in groups of one or none
        assert layer.process_group == written
        syncbn.convert(model, norm, **SYNCHRONIZED[norm], process_group=2)
        if isinstance(written, int):
            assert syncbn.revert(model)[1].process_group == written
        syncbn.convert(model, "wn")  # has no group
        assert type(syncbn.convert(model, "gn", num_groups=2)[1]) is nn.GroupNorm


@pytest.mark.parametrize("norm", SYNCHRONIZED)
def test_the_dimensions_of_the_last_input_come_back(norm):
    model = nn.Sequential(nn.Conv1d(3, 6, 1), syncbn.SyncBatchNorm(6), nn.ReLU())
    model(torch.randn(4, 3, 5))
    syncbn.convert(model, norm, **SYNCHRONIZED[norm], process_group=2)(torch.randn(4, 3, 5))
    assert type(syncbn.revert(model, as_batchnorm=True)[1]) is nn.BatchNorm1d


@pytest.mark.parametrize("norm", KINDS)
def test_a_fused_layer_activates(norm):
    import timm

    fused, x = filled(timm.layers.BatchNormAct2d), torch.randn(4, 6, 3, 2)
    plain = copy.deepcopy(syncbn.convert(filled(nn.BatchNorm2d), norm))
    torch.testing.assert_close(syncbn.convert(fused, norm)(x), plain(x).relu(), rtol=0, atol=0)
    assert type(syncbn.revert(fused)) is timm.layers.BatchNormAct2d


@pytest.mark.parametrize(
    ("word", "value", "wanted"),
    [
        ("r_max", 0.5, "a number, 1 or more"),
        ("r_max", float("nan"), "a number, 1 or more"),
        ("r_max", "3", "a number, 1 or more"),
        ("d_max", -1, "a number, 0 or more"),
        ("d_max", float("nan"), "a number, 0 or more"),
        ("momentum", 1.5, "a number, from 0 to 1"),
        ("warmup_steps", -1, "a whole number of training forwards, 0 or more"),
        ("r_ramp_steps", True, "a whole number of training forwards, 0 or more"),
        ("d_ramp_steps", 0.1, "a whole number of training forwards, 0 or more"),
    ],
)
def test_words_out_of_range_are_refused_before_anything_is_touched(word, value, wanted):
    with pytest.raises(ValueError, match=rf"{word}={value}.*expected {wanted}".replace("=3", "='3'")):
        syncbn.BatchRenorm(3, **{word: value})
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6))
    with pytest.raises(ValueError, match=rf"(?s)nothing was converted to 'brn'.*1: {word}=.*expected {wanted}"):
        syncbn.convert(model, "brn", **{word: value})
    assert type(model[1]) is nn.BatchNorm2d
    assert syncbn.plan(model, "brn", **{word: value})[0].to is None


def test_other_errors():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ValueError, match=r"1: BatchRenorm needs moving statistics.*; exclude the layer"):
        syncbn.convert(model, "brn")
    assert type(model[0]) is nn.BatchNorm1d
    syncbn.convert(model, "sn")
    assert model[1].running_mean is None
    for norm, words in (
        ("brn", "r_max, d_max, warmup_steps, r_ramp_steps, d_ramp_steps, momentum"),
        ("sn", "no keyword"),
    ):
        with pytest.raises(ValueError, match=f"norm '{norm}' takes {words}.*, not rmax"):
            syncbn.convert(model, norm, rmax=3)


def test_one_warning_of_no_warmup():
    with pytest.warns(UserWarning, match="warmup_steps=0 corrects the first batches") as caught:
        model = syncbn.convert(small(), "brn", warmup_steps=0)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        syncbn.convert(model, "brn", warmup_steps=0)  # already
        syncbn.convert(small(), "brn", warmup_steps=1)
    with pytest.warns(UserWarning, match="warmup_steps=0 corrects the first batches") as caught:
        syncbn.BatchRenorm(3, warmup_steps=0)
    assert [warning.filename for warning in caught] == [__file__]


def data_parallel_rank(rank, world_size, norm):
    """A few steps in DDP with uneven batches; buffers that differ at first are rank 0's from its construction on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3), nn.BatchNorm1d(3)).double()
    options = {"r_max": 1.1, "d_max": 0.05, "warmup_steps": 1, "r_ramp_steps": 1, "d_ramp_steps": 1}
    syncbn.convert(model, norm, **(options if norm == "brn" else {}))
    if world_size > 1:
        model[1].running_mean += rank
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for step in range(4):
        x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        part = x if world_size == 1 else (x[:4], x[4:])[rank]
        (model(part) ** 3).sum().mul(world_size).backward()  # DDP averages
        optimizer.step()
        optimizer.zero_grad()
    return {name.removeprefix("module."): value for name, value in model.state_dict().items()}


@pytest.mark.parametrize("norm", KINDS)
def test_in_ddp(run, norm):
    wanted = data_parallel_rank(0, 1, norm)
    for state in run(data_parallel_rank, 2, norm):
        torch.testing.assert_close(state, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", KINDS)
def test_freeze_and_population_statistics(norm):
    model, x = syncbn.convert(small(), norm), torch.randn(8, 3, 2, 2)
    clock = model[1].num_batches_tracked.clone()
    syncbn.update_bn_stats(model, [x[:5], x[5:]])
    y = model[0](x).detach().movedim(1, 0).flatten(1)
    torch.testing.assert_close(model[1].running_mean, y.mean(1))
    torch.testing.assert_close(model[1].running_var, y.var(1))
    assert model[1].num_batches_tracked == clock
    syncbn.freeze(model).train()
    before = copy.deepcopy(model[1].state_dict())
    model(x)
    torch.testing.assert_close(model[1].state_dict(), before, rtol=0, atol=0)
