"""Methods set on an instance: refused before anything is touched where another class would not have them."""

import copy
import functools
import types

import pytest
import torch
from torch import nn

import syncbn
from syncbn.nn.converted import SyncBatchNorm2d

X = torch.randn(2, 4, 3, 3)


def converted():
    return syncbn.convert(nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)))


def hooks():
    return pytest.importorskip("accelerate", reason="accelerate is not installed").hooks


@pytest.mark.parametrize("to", ["revert", "gn", "bn"])
def test_accelerates_hook_is_refused_until_it_is_removed(to):
    accelerate, model = hooks(), converted()
    undo = (
        syncbn.revert
        if to == "revert"
        else lambda m: syncbn.convert(m, to, **({"num_groups": 2} if to == "gn" else {}))
    )
    accelerate.add_hook_to_module(model[1], accelerate.ModelHook())
    expected = copy.deepcopy(model).eval()(X)
    with pytest.raises(ValueError, match=r"(?s)nothing was .*remove_hook_from_module\(model, recurse=True\)"):
        undo(model)
    assert [type(layer) for layer in model] == [SyncBatchNorm2d] * 2
    torch.testing.assert_close(model.eval()(X), expected)
    accelerate.remove_hook_from_module(model, recurse=True)
    assert "forward" in vars(model[1])  # left by accelerate: the method of the class as it was
    undo(model)
    assert "forward" not in vars(model[1])
    assert not any(isinstance(layer, syncbn.SyncBatchNorm) for layer in model)
    model(X)


def test_accelerates_hook_before_conversion():
    accelerate, model = hooks(), nn.Sequential(nn.BatchNorm2d(4))
    accelerate.add_hook_to_module(model[0], accelerate.ModelHook())
    with pytest.raises(ValueError, match="forward was set on the instance"):
        syncbn.convert(model)
    accelerate.remove_hook_from_module(model, recurse=True)
    syncbn.convert(model)
    assert "forward" not in vars(model[0])  # it would have gone on without the other ranks
    assert type(copy.deepcopy(syncbn.revert(model))[0]) is nn.BatchNorm2d


def by_hand(layer):
    layer.forward = lambda x: x


def by_update_wrapper(layer):
    old = layer.forward
    layer.forward = functools.update_wrapper(functools.partial(lambda module, x: old(x), layer), old)


def by_method_type(layer):
    old = layer.forward.__func__
    layer.forward = types.MethodType(lambda self, x: old(self, x) + 1, layer)


def dimensions(layer):
    old = layer._check_input_dim
    layer._check_input_dim = lambda x: old(x)


def shown(layer):
    layer.extra_repr = functools.partial(layer.extra_repr)


def group(layer):
    layer.train = functools.wraps(layer.train)(lambda mode=True, enter=layer._enter_ddp: layer)
    layer.extra_repr = functools.partial(lambda show: show(), layer.extra_repr)


@pytest.mark.parametrize("patch", [by_hand, by_update_wrapper, by_method_type, shown, group])
def test_patches_are_named_and_nothing_is_touched(patch):
    model = converted()
    patch(model[1])
    with pytest.raises(
        ValueError, match=r"(?s)nothing was reverted.*(forward|extra_repr) of 1 was set on the instance"
    ):
        syncbn.revert(model)
    with pytest.raises(ValueError, match=r"1: its (forward|extra_repr) was set on the instance"):
        syncbn.convert(model, "gn", num_groups=2)
    row = syncbn.plan(model, "bn")[1]
    assert row.to is None
    assert "was set on the instance" in row.reason
    assert [type(layer) for layer in model] == [SyncBatchNorm2d] * 2


def test_what_the_class_to_come_has_too_stays():
    model = converted()
    dimensions(model[1])  # calls a method of nn.BatchNorm2d
    model[1].train = lambda mode=True: model[1]  # calls nothing
    syncbn.revert(model)
    assert {"_check_input_dim", "train"} <= vars(model[1]).keys()
    model(X)


def test_copies_of_a_method_are_dropped_and_other_methods_are_patches():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    for layer in model:
        layer.forward, layer.extra_repr = layer.forward, layer.extra_repr
    syncbn.convert(model)
    assert not {"forward", "extra_repr"} & vars(model[0]).keys()
    model[0].forward = model[1].forward  # of another layer
    with pytest.raises(ValueError, match="forward of 0"):
        syncbn.revert(model)
    del model[0].forward
    model[0].forward = types.MethodType(nn.BatchNorm1d._check_input_dim, model[0])
    with pytest.raises(ValueError, match="forward of 0"):
        syncbn.revert(model)


def test_a_frozen_layer_reverts_and_unfreezes():
    model = syncbn.freeze(converted())
    syncbn.revert(model)
    assert not model.train()[0].training
    assert syncbn.unfreeze(model)[0].training


def test_a_layer_written_to_synchronize_is_refused_as_batchnorm():
    model = nn.Sequential(syncbn.SyncBatchNorm(4))
    by_hand(model[0])
    syncbn.revert(model)  # stays what it is
    with pytest.raises(ValueError, match="forward of 0"):
        syncbn.revert(model, as_batchnorm=True)
