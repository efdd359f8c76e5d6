"""Frozen statistics: eval mode that survives train(), for any BatchNorm class."""

import copy
import pickle

import pytest
import torch
from torch import nn

import syncbn


@pytest.mark.parametrize("convert", [False, True])
def test_frozen_statistics_survive_train(convert):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
    if convert:
        syncbn.convert(model)
    x = torch.randn(5, 3) * 3
    model(x)
    statistics = copy.deepcopy(dict(model[1].named_buffers()))
    assert syncbn.freeze(model) is model
    for frozen in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        frozen.train()
        assert frozen.training
        assert not frozen[1].training
        y = frozen(x)
        assert torch.equal(y, copy.deepcopy(frozen).eval()(x))
        (y**2).sum().backward()
        assert frozen[1].weight.grad is not None
        torch.testing.assert_close(dict(frozen[1].named_buffers()), statistics, rtol=0, atol=0)
        syncbn.unfreeze(frozen)
        assert frozen[1].training
        frozen(x)
        assert frozen[1].num_batches_tracked == 2


def test_unfreeze_gives_the_mode_without_freezing():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2).eval())
    syncbn.unfreeze(syncbn.freeze(syncbn.freeze(model)))
    assert [m.training for m in model] == [True, False]
    syncbn.freeze(model).eval()
    assert [m.training for m in syncbn.unfreeze(model)] == [False, False]


def test_conversion_keeps_a_layer_frozen():
    layer = syncbn.convert(syncbn.freeze(nn.BatchNorm1d(2)))
    assert not layer.train().training
    assert not syncbn.revert(layer).train().training


def test_without_statistics_nothing_is_frozen():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False))
    with pytest.raises(ValueError, match="got none in 1"):
        syncbn.freeze(model)
    assert model[0].training
    with pytest.warns(UserWarning, match="found no BatchNorm"):
        syncbn.freeze(nn.Linear(1, 1))
