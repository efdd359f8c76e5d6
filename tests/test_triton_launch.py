"""ops/triton up to the driver, for which there is a stub: what is compiled, how it is launched, what the host does.

Each test runs triton_stub.py's tools in a process without TRITON_INTERPRET.
"""

import ast
import os
import subprocess
import sys

import pytest
import triton_stub

PHASES = ["forward_reduce", "forward_apply", "backward_reduce", "backward_apply"]
STEP = """
import sys, torch, triton, torch.distributed as dist, triton_stub, syncbn
from types import SimpleNamespace
from torch.testing._internal.distributed.fake_pg import FakeStore
from syncbn.ops import backends
from syncbn.ops.triton import launch

driver = triton_stub.put_in_place()
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
stub = SimpleNamespace(kernels_for=lambda x, *_, **__: triton_stub.kernels_for(x), __name__="stub")
backends._BACK_ENDS = {"auto": [stub]}
layer, calls, looked_up = syncbn.SyncBatchNorm(64), [], []
x, dy = torch.randn(2, 64, 28, 28, requires_grad=True), torch.randn(2, 64, 28, 28)
run = triton.JITFunction.run
triton.JITFunction.run = lambda *args, **options: looked_up.append(args[0].__name__) or run(*args, **options)

def count(frame, event, _):
    if event == "call" and "/syncbn/" in frame.f_code.co_filename:
        calls.append((frame.f_code.co_filename.rsplit("/syncbn/")[-1], frame.f_code.co_name))

for step in range(3):
    driver.launches.clear(), looked_up.clear()
    sys.setprofile(count if step == 2 else None)
    layer(x).backward(dy)
    sys.setprofile(None)
"""


def run(code, tmp_path, *, check=True):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folder = os.path.dirname(__file__)
    env |= {"PYTHONPATH": os.pathsep.join([folder, *sys.path[1:]]), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=check)


def printed(code, tmp_path):
    return ast.literal_eval(run(code, tmp_path).stdout)


def test_a_steady_step(tmp_path):
    """Two launches each way, none by Triton's own look-up, and few Python calls."""
    code = STEP + ("print((calls, looked_up, [(l.name, l.grid, l.stream) for l in driver.launches]))")
    calls, looked_up, launches = printed(code, tmp_path)
    assert [name for name, *_ in launches] == PHASES
    assert {stream for *_, stream in launches} == {triton_stub.STREAM}
    assert looked_up == []
    assert len(calls) <= 20, calls
    assert len({file for file, _ in calls}) <= 4, calls


@pytest.mark.slow
def test_without_private_names_the_public_way(tmp_path):
    code = STEP.replace(
        "for step in",
        "warmup = triton.JITFunction.warmup\n"
        "class Hidden:\n"
        "    def __init__(self, kernel): self.kernel = kernel\n"
        "    def __getattr__(self, name):\n"
        "        if name == 'packed_metadata': raise AttributeError(name)\n"
        "        return getattr(self.kernel, name)\n"
        "triton.JITFunction.warmup = lambda *args, **options: Hidden(warmup(*args, **options))\n"
        "for step in",
    )
    code += "print((looked_up, [(l.name, l.grid, l.arguments[0]) for l in driver.launches]))"
    looked_up, launches = printed(code, tmp_path)
    assert looked_up == PHASES
    assert [name for name, *_ in launches] == PHASES


@pytest.mark.slow
def test_variants_are_compiled_and_graphs_are_told(tmp_path):
    """Memory that begins anywhere, frozen parameters, every momentum; a graph that is captured compiles nothing."""
    code = (
        "import torch, triton, triton_stub\n"
        "driver = triton_stub.put_in_place()\n"
        "x = torch.randn(2, 8, 28, 28)\n"
        "odd = torch.empty(x.numel() + 1)[1:].view(x.shape)\n"
        "kernels = triton_stub.kernels_for(x)\n"
        "for momentum in (0.1, None, torch.tensor(0.1)):\n"
        "    triton_stub.run_phases(kernels, x, momentum=momentum)\n"
        "triton_stub.run_phases(kernels, odd, running=False)\n"
        "triton_stub.run_phases(triton_stub.kernels_for(x[:0]), x[:0])\n"
        "num = len(kernels.compiled)\n"
        "kernels.is_capturing = lambda: True\n"
        "triton_stub.run_phases(kernels, x)\n"
        "assert len(kernels.compiled) == num\n"
        "try:\n"
        "    kernels.backward_reduce(odd, odd, torch.ones(17).double(), None, torch.float32)\n"
        "except RuntimeError as error:\n"
        "    print(repr(str(error)))\n"
    )
    assert "backward_reduce is not compiled" in printed(code, tmp_path)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((4, 3, 2**30 - 7), "float16"), ((2**31 + 7, 3), "bfloat16")],
)
@pytest.mark.slow
def test_sizes_beyond_31_bits_compile(tmp_path, shape, dtype):
    code = (
        "import torch, triton_stub\n"
        "from syncbn.ops.triton import launch\n"
        "driver = triton_stub.put_in_place()\n"
        f"shape, dtype = {shape}, torch.{dtype}\n"
        "view = (shape[0], 3, shape[2]) if len(shape) == 3 else (shape[0], 3, 1)\n"
        "tile = triton_stub.choose_tile(*view, dtype)\n"
        "small = torch.zeros(2, 3, 4, dtype=dtype)\n"
        "kernels = launch.TritonKernels(tile, view, triton_stub.choose_splits(tile, *view, 132), small)\n"
        "triton_stub.run_phases(kernels, small)\n"
        "print([l.name for l in driver.launches])\n"
    )
    assert printed(code, tmp_path) == PHASES


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_no_spills_and_wide_loads(tmp_path, arch):
    rows = run(f"import triton_stub\nfor row in triton_stub.registers({arch}): print(row)", tmp_path).stdout
    rows = [ast.literal_eval(row) for row in rows.splitlines()]
    assert len(rows) == 4 * len(triton_stub.CASES)
    for (shape, dtype, layout), name, num_registers, num_spilled, widest in rows:
        assert num_spilled == 0, (shape, dtype, layout, name)
        assert num_registers <= 96, (shape, dtype, layout, name)
        contiguous = int(shape.split("x")[1]) if layout == "channels last" or shape.count("x") == 1 else None
        contiguous = contiguous or int(shape.split("x")[2]) * int(shape.split("x")[3])
        if contiguous % 16 == 0:
            assert widest >= 8, (shape, dtype, layout, name)


def test_every_case_has_a_row_in_the_documentation():
    """The numbers in it depend on Triton's version: `python tests/triton_stub.py` prints them anew."""
    text = (triton_stub.Path(__file__).parents[1] / "docs" / "kernels.md").read_text()
    for shape, dtype, layout in triton_stub.CASES:
        assert f"| {'x'.join(map(str, shape))} | {str(dtype).removeprefix('torch.')} | {layout} |" in text
