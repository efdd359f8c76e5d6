"""What is published: the library alone, which works beside torch alone."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import syncbn

ROOT = Path(__file__).parents[1]
NAME = f"syncbn-{syncbn.__version__}"
SUFFIXES = {".py", ".cpp", ".h", ".typed"}
EXTRAS = ["lightning", "hydra", "torchmetrics", "torchvision", "timm", "sklearn", "rich", "scipy", "numpy", "triton"]
PROGRAM = f"""
import sys, warnings
for name in {EXTRAS}:
    sys.modules[name] = None  # importing it raises ImportError
warnings.simplefilter("ignore")  # torch's own, without NumPy
import torch, torch.distributed as dist, syncbn
from torch.testing._internal.distributed.fake_pg import FakeStore

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
for kernels in ("reference", "auto"):
    with syncbn.use_kernels(kernels):
        syncbn.convert(model)(torch.randn(2, 3, 8, 8)).square().mean().backward()
assert type(syncbn.revert(model)[1]) is torch.nn.BatchNorm2d
print(syncbn.__file__)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


def library():
    paths = {p.relative_to(ROOT).as_posix() for p in (ROOT / "syncbn").rglob("*") if p.suffix in SUFFIXES}
    assert {"syncbn/ops/csrc/kernels.cpp", "syncbn/ops/csrc/vectors.h", "syncbn/py.typed"} <= paths
    return paths


def test_the_wheel_is_the_library_and_nothing_else(built):
    [path] = built.glob("*.whl")
    about = {f"{NAME}.dist-info/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")}
    with zipfile.ZipFile(path) as wheel:
        assert set(wheel.namelist()) == library() | about
        metadata = wheel.read(f"{NAME}.dist-info/METADATA").decode().splitlines()
    assert [line for line in metadata if line.startswith("Requires-Dist") and "extra ==" not in line] == [
        "Requires-Dist: torch>=2.6"
    ]


def test_the_metadata_agrees_with_the_rest_of_the_repository(built):
    [path] = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        metadata = wheel.read(f"{NAME}.dist-info/METADATA").decode()
    assert f"version: {syncbn.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    versions = set(re.findall(r"^Classifier: .*Python :: (3\.\d+)$", metadata, re.MULTILINE))
    others = re.findall(r'\("(3\.\d+)", "torchvision', (ROOT / "noxfile.py").read_text())
    assert versions == {*others, "3.11"}  # 3.11: make test
    assert all(f"Project-URL: {name}" in metadata for name in ("Repository", "Documentation", "Issues", "Changelog"))


def test_the_sdist_is_the_library_and_nothing_else(built):
    [path] = built.glob("*.tar.gz")
    about = {"PKG-INFO", "pyproject.toml", "README.md", "LICENSE", ".gitignore"}
    with tarfile.open(path) as sdist:
        names = {name.removeprefix(f"{NAME}/") for name in sdist.getnames()}
    assert names == library() | about


def test_the_wheel_works_beside_torch_alone(built, tmp_path):
    [path] = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        wheel.extractall(tmp_path)
    command = [sys.executable, "-c", PROGRAM]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, str(tmp_path / "syncbn" / "__init__.py")), result.stderr
