"""Run syncbn's Triton kernels up to the driver, which is a stub: compiled for a GPU that is not there, and launched.

    python tests/triton_stub.py        # registers of all kernels, as the table in docs/kernels.md

Launches are recorded, with what they are given; nothing is computed. In a process without ``TRITON_INTERPRET=1``.
"""

import ast
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget

from syncbn.ops.layout import dense_view
from syncbn.ops.reference import Running
from syncbn.ops.triton import launch
from syncbn.ops.triton.tiles import choose_splits, choose_tile

STREAM = 7
NUM_MULTIPROCESSORS = 132
PTXAS = sorted((Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob("ptxas*"))
CASES = [  # maps of a ResNet-50 and others, in the layouts; each is a tile of its own
    ((32, 256, 56, 56), torch.float32, "contiguous"),
    ((32, 256, 56, 56), torch.bfloat16, "contiguous"),
    ((32, 256, 14, 14), torch.bfloat16, "contiguous"),
    ((32, 512, 7, 7), torch.bfloat16, "contiguous"),
    ((2, 512, 7, 7), torch.float32, "contiguous"),
    ((2, 64, 112, 112), torch.float16, "contiguous"),
    ((32, 128, 28, 28), torch.bfloat16, "channels last"),
    ((32, 128, 28, 28), torch.float32, "channels last"),
    ((2, 64, 28, 28), torch.float64, "contiguous"),
    ((2, 64, 28, 28), torch.float64, "channels last"),
    ((64, 1000), torch.float32, "contiguous"),
]


class Driver:
    """What Triton asks of a driver; ``launches`` are those it was asked for, ``kernels`` what was compiled."""

    def __init__(self, arch):
        self.target, self.launches, self.kernels = GPUTarget("cuda", arch, 32), [], []
        properties = {"max_shared_mem": 2**17}
        self.utils = SimpleNamespace(get_device_properties=lambda _: properties, load_binary=self.load)

    def load(self, name, *_):
        num_results = 4 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 4) else 5
        return (name, name, 0, 0, 1024)[:num_results]

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return STREAM

    def launcher_cls(self, source, metadata):
        def run(x, y, z, stream, function, metadata, launch_metadata, enter_hook, exit_hook, *arguments):
            self.launches.append(SimpleNamespace(name=function, grid=(x, y, z), stream=stream, arguments=arguments))

        return run


def put_in_place(arch=90):
    driver = Driver(arch)
    triton.runtime.driver.set_active(driver)
    return driver


def kernels_for(x):
    """Make the kernels as for a GPU, without the self-check, which would have to compute."""
    view = dense_view(x.shape, x.stride()) or (0, x.shape[1], 1)
    tile = choose_tile(*view, x.dtype)
    return launch.TritonKernels(tile, view, choose_splits(tile, *view, NUM_MULTIPROCESSORS), x)


def run_phases(kernels, x, *, weight=True, running=True, momentum=0.1):
    """Run the four phases on whatever numbers are in memory."""
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    mean, var, one = torch.ones(3, x.shape[1], dtype=dtype)
    counted = torch.tensor(1)
    buffers = Running(mean, var, counted, momentum) if running else Running()
    packed = kernels.forward_reduce(x, counted if running else None)
    _, statistics = kernels.forward_apply(x, packed, *(one, one) if weight else (None, None), buffers, 1e-5)
    dtypes = (dtype, dtype) if weight else (None, None)
    sums, *_ = kernels.backward_reduce(torch.empty_like(x), x, statistics, *dtypes)
    kernels.backward_apply(torch.empty_like(x), x, statistics, one if weight else None, sums)


def registers(arch):
    """Compile the kernels of all `CASES`; yield case, kernel, registers, bytes spilled and the widths of loads."""
    put_in_place(arch)
    compiled, warmup = [], triton.JITFunction.warmup

    def keep(kernel, *arguments, **options):
        compiled.append(warmup(kernel, *arguments, **options))
        return compiled[-1]

    triton.JITFunction.warmup = keep
    for shape, dtype, layout in CASES:
        x = torch.empty(shape, dtype=dtype)
        if layout == "channels last":
            x = x.to(memory_format=torch.channels_last)
        run_phases(kernels_for(x), x)
        for kernel in compiled:
            assembly = kernel.asm["ptx"]
            text = assemble(assembly)
            num_spilled = sum(map(int, re.findall(r"(\d+) bytes spill", text)))
            loads = re.findall(r"ld\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", assembly)
            widest = max(int(number or 1) * int(bits) // 8 for number, bits in loads if number or bits != "64")
            case = "x".join(map(str, shape)), str(dtype).removeprefix("torch."), layout
            yield case, kernel.metadata.name, int(re.search(r"Used (\d+)", text)[1]), num_spilled, widest
        compiled.clear()


def assemble(assembly):
    """Return what ptxas says of the registers; Triton brings one for old and one for new assembly."""
    target = re.search(r"\.target (\w+)", assembly)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(assembly)
        file.flush()
        for program in PTXAS:
            command = [program, "-v", f"-arch={target}", file.name, "-o", "/dev/null"]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode == 0:
                return result.stderr
    raise RuntimeError(result.stderr)


def main():
    names = ["forward_reduce", "forward_apply", "backward_reduce", "backward_apply"]
    print(f"Triton {triton.__version__}, 8 warps; registers of a thread for sm_80 / sm_90:\n")
    print(f"| map | dtype | layout | bytes of a load | {' | '.join(names)} |\n|{' --- |' * 8}")
    rows = {}
    for arch in ("80", "90"):  # each in a process: Triton compiles for one GPU
        text = subprocess.run([sys.executable, __file__, arch], capture_output=True, text=True, check=True).stdout
        for case, name, number, num_spilled, widest in map(ast.literal_eval, text.splitlines()):
            row = rows.setdefault(case, {"widest": widest})
            row.setdefault(name, []).append(f"{number} ({num_spilled} bytes spilled)" if num_spilled else f"{number}")
    for case, row in rows.items():
        cells = [*case, str(row["widest"]), *(" / ".join(row[name]) for name in names)]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    for arch in sys.argv[1:]:
        for row in registers(int(arch)):
            print(row)
