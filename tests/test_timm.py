"""timm's own tools on converted models: as on the model that was written, on its kinds of architectures."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import syncbn

timm = pytest.importorskip("timm", reason="timm is not installed")
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d  # noqa: E402
from timm.optim import param_groups_weight_decay  # noqa: E402
from timm.utils import ModelEmaV3  # noqa: E402
from timm.utils.model import freeze, reparameterize_model, unfreeze  # noqa: E402

QUICK = ["resnet18", "test_efficientnet"]
SLOW = [
    "repvgg_a0",
    "mobileone_s0", "levit_128s", "fastvit_t8", "mobilenetv3_small_050", "efficientnet_b0", "regnetx_002",
    "regnety_002", "densenet121", "dla34", "hrnet_w18_small", "res2net50_26w_4s", "rexnet_100", "ghostnet_050",
    "repghostnet_050", "ese_vovnet19b_slim_dw", "cspresnet50", "mnasnet_small", "lcnet_035", "tinynet_e",
    "mobilevit_xxs", "dpn48b", "vgg11_bn", "inception_v3",
]  # fmt: skip


def models(name):
    """A model as it was written, with statistics of its own, and a converted copy."""
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=5).eval()
    generator = torch.Generator().manual_seed(0)
    for layer in plain.modules():
        if isinstance(layer, _BatchNorm):
            layer.running_mean.normal_(0, 0.1, generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
    return plain, syncbn.convert(copy.deepcopy(plain))


def kinds(model):
    """Classes by name; of our layers those that were written."""
    found = {name: type(m) for name, m in model.named_modules()}
    originals = {n: m._syncbn_original.cls for n, m in model.named_modules() if "_syncbn_original" in vars(m)}
    return found | originals


@torch.no_grad()
def output(model):
    size = {"LevitDistilled": 224, "InceptionV3": 96}.get(type(model).__name__, 64)
    return model.eval()(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_tools_do_what_they_did_before(name):
    plain, ours = models(name)
    count = sum(isinstance(m, syncbn.SyncBatchNorm) for m in ours.modules())
    assert count == sum(isinstance(m, _BatchNorm) for m in plain.modules()) > 0
    assert torch.equal(output(ours), output(plain))
    for tool in (frozen, frozen_and_back, frozen_norms, averaged, reparametrized, grouped, synchronized_by_timm):
        expected, actual = tool(copy.deepcopy(plain)), tool(copied(ours))
        for part, (a, b) in enumerate(zip(actual, expected, strict=True)):
            same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            assert same, f"{tool.__name__}, part {part}"
    assert kinds(syncbn.revert(ours)) == kinds(plain)


def copied(model):
    return syncbn.convert(copy.deepcopy(model))


def everything(model):
    wants = {name: p.requires_grad for name, p in model.named_parameters()}
    return output(model), kinds(model), wants, sorted(model.state_dict())


def frozen(model):
    parts = [name for name, _ in model.named_children()]
    freeze(model, parts[: len(parts) // 2 + 1])
    return everything(model)


def frozen_and_back(model):
    freeze(model)
    unfreeze(model)
    return everything(model)


def frozen_norms(model):
    return everything(freeze_batch_norm_2d(model))


def averaged(model):
    average = ModelEmaV3(model, decay=0.9)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    average.update(model)
    assert {type(m) for m in average.module.modules()} == {type(m) for m in model.modules()}
    return everything(average.module)


def reparametrized(model):
    fused = reparameterize_model(model)
    return output(fused), kinds(fused), sorted(fused.state_dict())


def grouped(model):
    names = {id(p): name for name, p in model.named_parameters()}
    groups = param_groups_weight_decay(model, weight_decay=0.1)
    norms = tuple(value for name, value in vars(nn).items() if "Norm" in name)
    listed = [name for name, m in model.named_modules() if isinstance(m, norms)]
    return [(group["weight_decay"], [names[id(p)] for p in group["params"]]) for group in groups], listed


def synchronized_by_timm(model):
    with warnings.catch_warnings():  # of a converted model; see test_replaced.py
        warnings.filterwarnings("ignore", ".* was converted by syncbn and then replaced")
        return everything(convert_sync_batchnorm(model))
