"""Other versions of torch: what syncbn/compat.py makes alike, and what is done without torch's private names."""

import ast
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from torch import nn

import syncbn
from syncbn import compat, private
from syncbn.distributed import ddp

ROOT = Path(syncbn.__file__).parents[1]


@pytest.mark.parametrize(
    ("version", "expected"),
    [("2.6.0", (2, 6)), ("2.10.0+cu128", (2, 10)), ("2.6.0a0+ecf3bae40a.nv25.01", (2, 6)), ("3.0.0", (3, 0))],
)
def test_a_version_that_works(version, expected):
    assert compat.check_version(version) == expected


@pytest.mark.parametrize("version", ["2.5.1", "2.5.0a0+git", "1.13.1"])
def test_a_version_that_is_too_old(version):
    with pytest.raises(ImportError, match=r"syncbn needs torch 2\.6 or later"):
        compat.check_version(version)


def test_a_torch_that_is_too_old_is_refused_at_import():
    version = "2.5.1"
    code = f"import torch; torch.__version__ = {version!r}; import syncbn"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 1
    expected = f"syncbn needs torch 2.6 or later (tested with {compat.TESTED}), got torch {version}; upgrade it: "
    assert done.stderr.strip().splitlines()[-1].startswith(f"ImportError: {expected}")


def test_without_bias():
    for layer in (syncbn.SyncBatchNorm(3, bias=False), syncbn.GhostBatchNorm(3, 2, bias=False)):
        assert list(layer.state_dict()) == ["weight", "running_mean", "running_var", "num_batches_tracked"]
        layer.weight.data.fill_(5)
        layer.running_mean.fill_(5)
        layer.reset_parameters()
        assert layer.bias is None
        assert (layer.weight == 1).all()
        assert (layer.running_mean == 0).all()
    assert syncbn.SyncBatchNorm(3, affine=False).bias is None
    syncbn.SyncBatchNorm(3, affine=False).reset_parameters()


def test_what_ddp_hides_is_a_warning():
    """Subgroups need two names of DDP; without them a layer says once what to do instead."""
    wrapped = types.SimpleNamespace(module=nn.Linear(1, 1), parameters_to_ignore=set())

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.__dict__.update(vars(wrapped))

    module = Module()
    with pytest.warns(RuntimeWarning, match="_assign_modules_buffers.*forward_sync_buffers=False"):
        ddp.keep_from_copies(module, lambda layer: True)
    ddp.keep_from_copies(module, lambda layer: True)  # said once: a warning would be an error here


def test_modules_without_private_names():
    """What stands on a module of the user's, and not in torch itself."""
    assert not private.is_compiled(object())
    assert not private.joins(object())
    assert private.input_check_of(object)(nn.BatchNorm2d(1), None) is None


def private_names(path):
    """Yield private names of torch that a file uses."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = ast.unparse(node.value)
            if owner.split(".")[0] in ("torch", "dist", "nn", "nn_module") or owner in ("group", "ddp"):
                yield f"{owner}.{node.attr}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            yield from (f"{node.module}: {name}" for name in names if name.startswith("_"))


# Base classes that have not moved since torch 1.0, and what is looked up with a fall-back where it is used.
ALLOWED = {
    "torch.nn.modules.batchnorm: _BatchNorm", "torch.nn.modules.instancenorm: _InstanceNorm",
    "torch.nn.modules.conv: _ConvNd", "ddp._assign_modules_buffers",
}  # fmt: skip


def test_private_names_stand_in_one_file():
    paths = (ROOT / "syncbn").rglob("*.py")
    found = {path.relative_to(ROOT).as_posix(): set(private_names(path)) - ALLOWED for path in paths}
    assert found.pop("syncbn/private.py")
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.slow
def test_everything_works_without_private_names(tmp_path):
    """On two ranks, with `without_private_names.py`."""
    program, environment = Path(__file__).with_name("without_private_names.py"), os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "launch"), str(program.parent)])
    ranks = [
        subprocess.Popen(
            [sys.executable, str(program), str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, output
        assert output.count("check_") == 6
