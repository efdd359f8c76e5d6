"""The import arrows, of the library and of the experiments; sizes; how few Python calls a step makes."""

import ast
import graphlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import syncbn

ROOT = Path(syncbn.__file__).parent
# Lower may not import higher; rooms of the same height know nothing of each other.
HEIGHT = {
    "compat": 0, "build": 0,
    "private": 1,
    "distributed": 2,
    "ops": 3,
    "plain": 4, "memory": 4,
    "local": 5,
    "functional": 6,
    "nn": 7,
    "debug": 8, "conversion": 8, "statistics": 8,
    "folding": 9,
    "audit": 10,
    "__init__": 11,
    "lightning": 12,
}  # fmt: skip
# The same of launch/: the names are those that a file in it imports, the longest that matches.
LAUNCH = Path(__file__).parents[1] / "launch"
LAUNCH_HEIGHT = {
    "experiment.training.atomic_files": 0, "experiment.training.saved_settings": 0,
    "experiment.training.instantiate": 0, "experiment.training.known_warnings": 0, "experiment.training.schedule": 0,
    "experiment.training.world": 0, "experiment.training.sharding": 0,
    "experiment.training.models": 1, "experiment.training.image_set": 1, "experiment.training.norm_config": 1,
    "experiment.training.shares": 1,
    "experiment.training.task": 2, "experiment.training.data": 2, "experiment.training.memory_format": 2,
    "experiment.training.datasets": 3, "experiment.training.segmentation": 3, "experiment.training.report": 3,
    "experiment.training.freeze_late": 3,
    "experiment.resume": 4, "experiment.simulation": 4,
    "experiment.evaluate": 5,
    "experiment.pages": 1,
    "experiment.comparison": 6,
    "experiment.bench": 4, "experiment.bench.scaling": 5, "experiment.bench.registry": 6, "experiment.bench.report": 7,
    "experiment.gpu_check": 5,
    "experiment.claims": 7,
    "train": 7, "compare": 7, "bench": 8, "gpu_check": 7, "ray_train": 8, "claims": 8,
}  # fmt: skip
DOOR = {("nn", "convert_sync_batchnorm")}  # calls the public convert(): torch's name for it is a method


def room(path):
    relative = path.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


def imports(path):
    """Yield (enclosing function, imported room of syncbn) of one file."""
    tree = ast.parse(path.read_text())
    inside = {node: f.name for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    depth = len(path.relative_to(ROOT).parts)
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.level:
            package = [*path.relative_to(ROOT).parts[: depth - node.level]]
            base = [*package, *(node.module or "").split(".")] if node.module else package
            names = [base[0]] if base else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "syncbn":
            names = [[*node.module.split("."), "__init__"][1]]
        elif isinstance(node, ast.Import):
            names = [[*a.name.split("."), "__init__"][1] for a in node.names if a.name.split(".")[0] == "syncbn"]
        for name in names:
            yield inside.get(node), name


def test_imports_go_one_way():
    for path in sorted(ROOT.rglob("*.py")):
        here = room(path)
        for function, there in imports(path):
            if there == here or (here, function) in DOOR:
                continue
            assert there in HEIGHT, f"{path.name} imports {there}: give it a height"
            assert HEIGHT[there] < HEIGHT[here], f"{path.relative_to(ROOT)} imports {there}"


def module(path):
    return ".".join(path.relative_to(LAUNCH).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path) for path in LAUNCH.rglob("*.py")}


def launch_imports(path):
    """Yield the modules of launch/ that one file of it imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [(alias.name, alias.name) for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            package = module(path).split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *filter(None, [node.module])])
            names = [(f"{base}.{alias.name}", base) for alias in node.names]
        yield from (name if name in MODULES else base for name, base in names if {name, base} & MODULES)


def launch_height(name):
    while name not in LAUNCH_HEIGHT:
        name = name.rpartition(".")[0]
        assert name, "give it a height"
    return name, LAUNCH_HEIGHT[name]


def test_imports_of_the_experiments_go_one_way():
    graph = {module(path): set(launch_imports(path)) for path in LAUNCH.rglob("*.py")}
    assert "experiment.comparison.worker" in graph["experiment.comparison.runner"]
    assert "train" in graph["ray_train"]
    for here, imported in graph.items():
        for there in imported:
            (room_here, low), (room_there, high) = launch_height(here), launch_height(there)
            assert room_here == room_there or high < low, f"{here} imports {there}"
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_the_library_knows_nothing_of_the_experiments():
    for path in ROOT.rglob("*.py"):
        assert "experiment" not in path.read_text(), path


def test_only_distributed_calls_torch_distributed():
    for path in ROOT.rglob("*.py"):
        if room(path) in ("distributed", "compat", "private", "lightning"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert not called.startswith(("dist.", "torch.distributed.")), f"{path.name}: {called}"


def test_the_door_is_sorted_and_torch_is_enough():
    assert syncbn.__all__ == sorted(syncbn.__all__)
    assert all(hasattr(syncbn, name) for name in syncbn.__all__)
    code = (
        "import sys, syncbn; extra = {'lightning', 'hydra', 'torchmetrics', 'torchvision', 'timm', 'torch._dynamo'};"
        "extra.add('triton');"
        "sys.exit(', '.join(extra & set(sys.modules)) or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def source(*rooms, suffixes=(".py",)):
    """Yield the files of some rooms, of all without an argument."""
    for path in sorted(ROOT.rglob("*")):
        if path.suffix in suffixes and (not rooms or room(path) in rooms):
            yield path


def num_lines(paths):
    return sum(len(path.read_text().splitlines()) for path in paths)


def test_it_stays_small():
    triton = sorted((ROOT / "ops" / "triton").glob("*.py"))
    core = {*source("ops", "functional", "distributed"), ROOT / "nn" / "batchnorm.py"} - {*triton}
    assert num_lines(core) <= 1700
    assert num_lines(triton) <= 450
    assert num_lines(source("ops", suffixes=(".cpp", ".h"))) <= 470
    assert num_lines({*source()} - {*triton}) <= 9050
    files = [*source(), *LAUNCH.rglob("*.py")]
    assert {path.name: num_lines([path]) for path in files if num_lines([path]) > 200} == {}


def test_arithmetic_and_layers_know_nothing_of_the_order_check():
    for path in source("ops", "functional", "distributed", "nn", "statistics"):
        assert "debug" not in {there for _, there in imports(path)}, path


COUNT = """
import sys, torch, torch.distributed as dist, syncbn
from torch.testing._internal.distributed.fake_pg import FakeStore

def count(frame, event, _):
    if event == "call" and "/syncbn/" in frame.f_code.co_filename:
        calls.append((frame.f_code.co_filename.rsplit("/syncbn/")[-1], frame.f_code.co_name))

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
layer, calls = syncbn.SyncBatchNorm(64), []
x, dy = torch.randn(2, 64, 8, 8, requires_grad=True), torch.randn(2, 64, 8, 8)
for step in range(3):
    sys.setprofile(count if step == 2 else None)
    layer(x).backward(dy)
    sys.setprofile(None)
print(len(calls), len({file for file, _ in calls}), calls)
"""


@pytest.mark.parametrize("kernels", ["cpu", pytest.param("reference", marks=pytest.mark.slow)])
def test_a_steady_step_makes_few_python_calls(kernels):
    if kernels == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler is installed")
    env = os.environ | {"SYNCBN_KERNELS": kernels}
    result = subprocess.run([sys.executable, "-c", COUNT], env=env, capture_output=True, text=True, check=True)
    num_calls, num_files, calls = result.stdout.split(maxsplit=2)
    assert f"ops/{kernels}.py" in calls
    assert int(num_calls) <= 20, calls
    assert int(num_files) <= 4, calls
