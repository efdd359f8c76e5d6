"""The import arrows, from moments, kernels and collectives up to the experiment."""

import ast
import subprocess
import sys
from pathlib import Path

import syncbn

ROOT = Path(syncbn.__file__).parent
# Lower may not import higher; rooms of the same height know nothing of each other, but for what is listed.
HEIGHT = {
    "compat": -2, "private": -1,
    "moments": 0, "kernels": 0, "collectives": 0,
    "recompute": 1, "debug": 1,
    "step": 2,
    "autograd": 3, "ddp": 3,
    "functional": 4,
    "batchnorm": 5, "ghost": 5,
    "coalesce": 6, "norms": 6, "swap": 6, "freeze": 6, "precise": 6,
    "rules": 7, "audit": 7,
    "convert": 8,
    "__init__": 9,
    "lightning": 10,
    "experiment": 11,
}  # fmt: skip
DOOR = {("batchnorm", "convert_sync_batchnorm")}  # calls the public convert(): torch's name for it is a method


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


def test_only_collectives_calls_torch_distributed():
    for path in ROOT.rglob("*.py"):
        if room(path) in ("collectives", "compat", "private", "lightning", "experiment"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert not called.startswith(("dist.", "torch.distributed.")), f"{path.name}: {called}"


def test_the_door_is_sorted_and_torch_is_enough():
    assert syncbn.__all__ == sorted(syncbn.__all__)
    assert all(hasattr(syncbn, name) for name in syncbn.__all__)
    code = (
        "import sys, syncbn; extra = {'lightning', 'hydra', 'torchmetrics', 'torchvision', 'timm', 'torch._dynamo'};"
        "sys.exit(', '.join(extra & set(sys.modules)) or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
