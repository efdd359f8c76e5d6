"""ultralytics' own tools on a converted yolo11n: optimizer groups, frozen layers, fusion, as before."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import syncbn

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def yolo():
    """A yolo11n as it was written, and a converted copy."""
    pytest.importorskip("ultralytics", reason="ultralytics is not installed")
    from ultralytics import YOLO

    torch.manual_seed(0)
    plain = YOLO("yolo11n.yaml").model
    ours = syncbn.convert(copy.deepcopy(plain))
    assert sum(isinstance(m, syncbn.SyncBatchNorm) for m in ours.modules()) == 81
    return plain, ours


def trainer(model, **attributes):
    from ultralytics.models.yolo.detect import DetectionTrainer

    made = object.__new__(DetectionTrainer)
    vars(made).update(model=model, args=SimpleNamespace(lr0=0.01), data={}, **attributes)
    return made


@pytest.mark.parametrize("name", ["SGD", "AdamW", "MuSGD"])
def test_optimizer_groups_are_those_of_before(yolo, name):
    def groups(model):
        names = {id(p): n for n, p in model.named_parameters()}
        optimizer = trainer(model).build_optimizer(model, name=name)
        return [(g["weight_decay"], sorted(names[id(p)] for p in g["params"])) for g in optimizer.param_groups]

    plain, ours = yolo
    found = groups(ours)
    assert found == groups(plain)
    norms = {f"{n}.weight" for n, m in ours.named_modules() if isinstance(m, syncbn.SyncBatchNorm)}
    assert not any(decay and norms & set(names) for decay, names in found)


def test_frozen_layers_are_those_of_before(yolo):
    def in_eval_mode(model):
        trainer(model, freeze_layer_names=[f"model.{i}." for i in range(10)])._model_train()
        return [n for n, m in model.named_modules() if not m.training]

    plain, ours = yolo
    found = in_eval_mode(ours)
    assert found == in_eval_mode(plain)
    assert len(found) > 20


def test_it_fuses_as_before(yolo):
    x = torch.rand(1, 3, 64, 64)
    plain, ours = (copy.deepcopy(model).eval() for model in yolo)
    expected = copy.deepcopy(plain).fuse(verbose=False)(x)[0]
    for model in (ours, syncbn.revert(copy.deepcopy(ours))):
        fused = model.fuse(verbose=False)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
        assert torch.equal(fused(x)[0], expected)
