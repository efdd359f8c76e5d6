"""Run the CUDA branches of the GPU check where there is no GPU.

    PYTHONPATH=.:launch python tests/gpu_stand_ins.py machine layer
    PYTHONPATH=.:launch TRITON_INTERPRET=1 python tests/gpu_stand_ins.py triton

Tensors that are asked for on "cuda" are made on the CPU, the operators of ops/cuda.py are those of
test_cuda_kernels.py, and events, streams and the like do nothing. It shows that the code runs, not that a GPU agrees.
The second command runs what is of Triton alone on small inputs, in its interpreter. Prints the records of the parts as
JSON.
"""

import contextlib
import json
import sys
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import test_cuda_kernels
import torch
import torch.distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode

from experiment.gpu_check import (
    determinism,
    large_tensors,
    launches,
    layer,
    machine,
    phase_cases,
    phases,
    registry,
    training_step,
    worker,
)
from syncbn.distributed import exchange


class ToCpu(TorchFunctionMode):
    """Puts on the CPU what is asked for on "cuda"."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {name: place(value) for name, value in (kwargs or {}).items()}
        return func(*map(place, args), **kwargs)


def place(value):
    return torch.device("cpu") if isinstance(value, str | torch.device) and str(value) == "cuda" else value


class Event:
    def __init__(self, enable_timing=False):
        self.time = 0.0

    def record(self):
        self.time = time.perf_counter()

    def query(self):
        return False  # the GPU is still busy

    def elapsed_time(self, other):
        return 1e3 * (other.time - self.time)


class Graph:
    def replay(self):
        raise RuntimeError("a stand-in replays nothing")


def nothing(*_, **__):
    return None


PROPERTIES = {"name": "stand-in", "major": 9, "minor": 0, "multi_processor_count": 132, "L2_cache_size": 10**6}
CUDA = {
    "Event": Event,
    "Stream": lambda: SimpleNamespace(wait_stream=nothing),
    "CUDAGraph": Graph,
    "graph": lambda *_, **__: contextlib.nullcontext(),
    "stream": lambda _: contextlib.nullcontext(),
    "current_stream": lambda: SimpleNamespace(wait_stream=nothing),
    "get_device_properties": lambda _: SimpleNamespace(**PROPERTIES),
    "mem_get_info": lambda _: (70 * 2**30, 80 * 2**30),
    "device_count": lambda: 1,
    "is_available": lambda: True,
    "is_current_stream_capturing": lambda: False,
    "memory_allocated": lambda: 0,
    "max_memory_allocated": lambda: 2**20,
} | dict.fromkeys(["synchronize", "_sleep", "set_sync_debug_mode", "reset_peak_memory_stats", "empty_cache"], nothing)


torch_forward = nn.SyncBatchNorm.forward


def sync_forward(layer, x):
    """Run nn.SyncBatchNorm on the CPU, which it refuses, but as the backend that others may add."""
    with mock.patch.object(torch._C, "_get_privateuse1_backend_name", return_value="cpu"):
        return torch_forward(layer, x)


@contextlib.contextmanager
def stand_ins():
    init, autocast = dist.init_process_group, torch.autocast
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (dist, "init_process_group", lambda name, **options: init("gloo" if name == "nccl" else name, **options)),
            (torch, "autocast", lambda _, *args, **options: autocast("cpu", *args, **options)),
            (nn.SyncBatchNorm, "forward", sync_forward),
            (exchange, "_GATHER_BYTES", 0),
            (machine, "GIB", 2**26),
            (phases, "BACK_ENDS", {"cuda": ("reference", "cuda")}),
            (layer, "_SHAPES", {"cuda": ((16, 14),)}),
            (layer, "_BATCH_SIZES", {"cuda": (2,)}),
            (layer, "_ROUNDS", {"cuda": 2}),
            (training_step, "_ROUNDS", {"cuda": 2}),
            (
                training_step,
                "_SETTINGS",
                {"cuda": [training_step.Setting(1, 64, 96, "bfloat16", "channels_last", 8, True)]},
            ),
            (determinism, "_SHAPES", {"cuda": ((4, 8, 6, 6),)}),
            (determinism, "_NUM_RUNS", 3),
            (determinism, "_NUM_BATCHES", 2),
            (launches, "_launched", launches._operators),  # the profiler sees no GPU
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(mock.patch.multiple(torch.cuda, **CUDA))
        stack.enter_context(test_cuda_kernels.stand_ins())
        stack.enter_context(ToCpu())
        yield


def interpreted():
    """Run Triton's phases on the CPU."""
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (phases, "BACK_ENDS", {"cpu": ("triton",)}),
            (phase_cases, "_SHAPES", phase_cases._SHAPES[:2]),
            (large_tensors, "_NUM", 264),
            (large_tensors, "_PIECE", 64),
            (large_tensors, "_END", 50),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        [of_phases, of_large] = registry.choose("phases,large")
        return [worker.run(of_phases, "cpu"), worker.run(replace(of_large, needs=()), "cpu")]


def main(names):
    with stand_ins():
        return [worker.run(part, "cuda") for part in registry.choose(",".join(names))]


if __name__ == "__main__":
    records = interpreted() if sys.argv[1:] == ["triton"] else main(sys.argv[1:])
    print(json.dumps(records))
