"""Another converter over a converted model: one warning, and rows of plan and revert that name the layers."""

import copy
import gc
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import nn

import syncbn
from syncbn import SyncBatchNorm
from syncbn.conversion import replaced

torch_converts = nn.SyncBatchNorm.convert_sync_batchnorm


def timm_converts(model):
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(model)


def mmengine_converts(model):
    pytest.importorskip("mmengine", reason="mmengine is not installed")
    from mmengine.model.utils import convert_sync_batchnorm

    return convert_sync_batchnorm(model)


def net():
    block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    return nn.ModuleDict({"stem": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), "block": block})


@pytest.mark.parametrize("converts", [torch_converts, timm_converts, mmengine_converts])
def test_one_warning_names_the_layer_the_class_and_what_to_drop(converts):
    model = syncbn.convert(net(), process_group=2)
    with pytest.warns(UserWarning, match="was converted by syncbn and then replaced") as caught:
        converts(model)
    (warning,) = (str(w.message) for w in caught)
    assert warning.startswith("stem.1 (ModuleDict)")
    for part in ("SyncBatchNorm", "convert_sync_batchnorm", "--sync-bn", "auto_model(sync_bn=True)", "plan(model)"):
        assert part in warning
    assert caught[0].filename.endswith(("batchnorm.py", "norm_act.py", "utils.py", "module.py"))  # who did it
    rows = syncbn.plan(model)
    assert [row.name for row in rows] == ["stem.1", "block.1"]
    assert all("was replaced after syncbn.convert" in row.reason for row in rows)
    with pytest.warns(UserWarning, match=r"cannot give back stem.1 \(ModuleDict\), now a SyncBatchNorm; block.1"):
        syncbn.revert(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        syncbn.revert(model)  # said once
        syncbn.convert(model)  # after it: right
        assert all(row.reason == "already" for row in syncbn.plan(model))


def auto_model(rank, world_size):
    import ignite.distributed as idist

    model = syncbn.convert(net(), process_group=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules"):  # DDP's
            idist.auto_model(model, sync_bn=True)
    return [str(w.message) for w in caught if "syncbn" in str(w.message)]


def test_ignites_auto_model(run):
    pytest.importorskip("ignite", reason="ignite is not installed")
    for (warning,) in run(auto_model, 2):
        assert warning.startswith("stem.1 (ModuleDict)")
        assert "Ignite's auto_model(sync_bn=True)" in warning


def test_timms_activation_survives():
    from timm.layers import BatchNormAct2d

    model = syncbn.convert(nn.Sequential(BatchNormAct2d(4, act_layer=nn.SiLU))).eval()
    x = torch.randn(2, 4, 3, 3)
    expected = model(x)
    with pytest.warns(UserWarning, match=r"replaced by a timm\.layers\.norm_act\.SyncBatchNormAct"):
        timm_converts(model)
    assert torch.equal(model(x), expected)


def test_a_layer_that_is_still_referred_to_is_found_by_plan_and_revert():
    model = syncbn.convert(net())
    kept = list(model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch_converts(model)
        assert sum("was replaced" in row.reason for row in syncbn.plan(model)) == 2
    with pytest.warns(UserWarning, match="replaced by a torch.nn.modules.batchnorm.SyncBatchNorm"):
        kept.clear()
    with pytest.warns(UserWarning, match="cannot give back"):
        syncbn.revert(model)


def no_warning(action):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        action(syncbn.convert(net()))
        gc.collect()


def in_a_cycle(model):
    model.itself = [model]


def freezes(model):
    from torchvision.ops import FrozenBatchNorm2d

    model["stem"][1] = FrozenBatchNorm2d(4)


def takes_out(model):
    model["stem"][1] = nn.Identity()


def reverts_and_replaces(model):
    syncbn.revert(model)
    torch_converts(model)


def other_norm_and_replaces(model):
    torch_converts(syncbn.convert(model, "gn", num_groups=2))
    torch_converts(syncbn.convert(model, "bn"))


def replaces_by_ours(model):
    model["stem"][1] = SyncBatchNorm(4)


def shifts(model):
    """A container gives its entries other names: the plain layer comes to where ours was."""
    part = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    syncbn.convert(part, exclude=["2"])
    del part[0:2]
    assert type(part[0]) is nn.BatchNorm2d
    part = syncbn.convert(nn.Sequential(nn.BatchNorm2d(4)))
    part.insert(0, nn.BatchNorm2d(4))
    assert "converter" not in syncbn.plan(part)[0].reason


def copies(model):
    torch_converts(copy.deepcopy(model))  # a copy is not watched: its original lives


@pytest.mark.parametrize(
    "action",
    [
        lambda model: None, in_a_cycle, freezes, takes_out, reverts_and_replaces, other_norm_and_replaces,
        replaces_by_ours, shifts, copies,
    ],
)  # fmt: skip
def test_what_is_not_replacement_is_silent(action, capsys):
    no_warning(action)
    assert capsys.readouterr().err == ""


def test_a_filter_that_makes_warnings_errors_loses_nothing_and_raises_nothing(capsys):
    model = syncbn.convert(net())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch_converts(model)
    assert "syncbn: stem.1 (ModuleDict) was converted by syncbn and then replaced" in capsys.readouterr().err


def test_nothing_is_put_on_the_users_modules_and_nothing_is_kept_alive():
    model = net()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    syncbn.convert(model)
    syncbn.revert(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    num = len(replaced._entries)
    models = [syncbn.convert(net()) for _ in range(3)]
    assert len(replaced._entries) == num + 6
    models.clear()
    assert len(replaced._entries) == num


def test_threads_convert_and_drop_models():
    errors = []

    def work():
        try:
            for _ in range(30):
                torch_converts(syncbn.convert(net()))
        except Exception as error:
            errors.append(error)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []


AT_EXIT = """
import torch, syncbn
from torch import nn
model = syncbn.convert(nn.Sequential(nn.BatchNorm2d(2)))
layer = model[0]
model[0] = nn.SyncBatchNorm(2)
other = syncbn.convert(nn.Sequential(nn.BatchNorm2d(2)))
other.itself = other.__dict__
"""


@pytest.mark.slow
def test_the_end_of_the_interpreter_is_quiet():
    result = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True, check=True)
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr
