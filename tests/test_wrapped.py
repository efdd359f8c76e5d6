"""A model that is wrapped already: what is said names the call to convert before, of whoever wrapped it."""

import os
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from versions import SHARDS_ON_CPU

import syncbn
from syncbn.conversion.third_party import unwrap


def net():
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))


def refused(model):
    with pytest.raises(ValueError, match="already wrapped") as caught:
        syncbn.convert(model)
    assert "convert, then compile, shard or wrap, then make the optimizer" in str(caught.value)
    reasons = {row.reason for row in syncbn.plan(model) if "already wrapped" in row.reason}
    assert all(reason in str(caught.value) for reason in reasons)
    return reasons


class DeepSpeedEngine(nn.Module):
    """Its name is all that conversion looks at."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def compiled_in_place(model):
    model.compile()
    return model


@pytest.mark.parametrize(
    ("wrap", "call"),
    [
        (nn.DataParallel, "DataParallel"),
        (torch.compile, "torch.compile"),
        (compiled_in_place, "torch.compile"),
        (DeepSpeedEngine, "deepspeed.initialize"),
    ],
)
def test_in_one_process(wrap, call):
    for reason in refused(wrap(net())):
        assert f": call syncbn.convert before {call}. The order" in reason


class OwnDDP(DistributedDataParallel):
    """A subclass, as mmengine has."""


def ddp(rank, world_size):
    (plain,) = refused(DistributedDataParallel(net()))
    (own,) = refused(OwnDDP(net()))
    assert unwrap(OwnDDP(net()))[1].num_features == 4
    return plain, own


def test_in_ddp_and_its_subclasses(run):
    for plain, own in run(ddp, 2):
        assert plain == own
        assert "by DistributedDataParallel: call syncbn.convert before DistributedDataParallel. " in plain


def fsdp2(rank, world_size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    return refused(model)


@SHARDS_ON_CPU
def test_in_fsdp2(run):
    for (reason,) in run(fsdp2, 2):
        assert "by FSDPModule: call syncbn.convert before fully_shard. " in reason


def accelerate(rank, world_size):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    with mock.patch.dict(os.environ, {name: str(value) for name, value in torchrun.items()}):
        try:
            return refused(Accelerator(cpu=True).prepare(net()))
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def fabric(rank, world_size):
    from lightning.fabric.strategies import DDPStrategy
    from lightning.fabric.wrappers import _FabricModule

    model = net()
    wrapped = _FabricModule(DistributedDataParallel(model), DDPStrategy(), original_module=model)
    assert unwrap(wrapped) is model
    return refused(wrapped)


def mmengine(rank, world_size):
    from mmengine.model import MMDistributedDataParallel

    return refused(MMDistributedDataParallel(net()))


def lightning(rank, world_size):
    from lightning.pytorch.demos.boring_classes import BoringModel

    module = BoringModel()
    module.layer = net()
    (wrapped,) = refused(DistributedDataParallel(module))
    module.layer.compile()
    (compiled,) = refused(module)
    assert wrapped.split(": ")[1] == compiled.split(": ")[1]
    return {compiled}


@pytest.mark.parametrize(
    ("package", "wrap", "advice"),
    [
        ("accelerate", accelerate, "call syncbn.convert before accelerator.prepare."),
        ("lightning", fabric, "call syncbn.convert before fabric.setup."),
        ("mmengine", mmengine, "call syncbn.convert before it wraps, in the Runner's wrap_model."),
        ("lightning", lightning, "use syncbn.lightning.NormConverter, or"),
    ],
)
def test_the_advice_is_that_of_the_framework(run, package, wrap, advice):
    pytest.importorskip(package, reason=f"{package} is not installed")
    for reasons in run(wrap, 2):
        assert reasons
        for reason in reasons:
            assert advice in reason


def test_a_wrapped_layer_that_is_shared_by_name_only_is_free():
    """A module called ``module`` is no wrapper."""
    model = nn.ModuleDict({"module": net()})
    assert unwrap(model) is model
    assert isinstance(syncbn.convert(model)["module"][1], syncbn.SyncBatchNorm)
