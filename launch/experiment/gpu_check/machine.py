"""Part `machine`: what the machine is, how fast it copies, and what a launch costs the host."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from syncbn.ops import triton

from . import cuda_calls
from .result import Outcome, Row, Table

GIB = 2**30
_NUM_LAUNCHES = 500  # fewer than a GPU's queue takes (about 1000) before the host has to wait for it


def measure(device: str) -> Outcome:
    """Describe the machine and time a copy and a small operator."""
    bandwidth = _copy_bandwidth(device)
    x = torch.zeros(8, device=device)
    launch = _host_cost(lambda: x.add_(1.0), device)
    facts = _gpu_facts() if device == "cuda" else {}
    facts |= {"CPU": _cpu_model(), "CPUs": os.cpu_count(), "torch threads": torch.get_num_threads()}
    facts |= {"copy, GB/s read and written": bandwidth, "one small operator, µs of the host": launch}
    facts |= _triton_launches(device) if device == "cuda" else {}
    rows: list[Row] = [{"what": what, "value": value} for what, value in facts.items()]
    name = facts.get("GPU", facts["CPU"])
    summary = f"{name}: copy {bandwidth:.0f} GB/s, a small operator {launch:.1f} µs of the host"
    return Outcome(summary, [Table("Machine", rows)])


def _gpu_facts() -> Row:
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    return {
        "GPU": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory, GiB": total / GIB,
        "free memory, GiB": free / GIB,
        "L2 cache, MB": getattr(properties, "L2_cache_size", 0) / 1e6 or "unknown",
        "GPUs": torch.cuda.device_count(),
    }


def _copy_bandwidth(device: str) -> float:
    """Return GB/s of a copy of what no cache holds, reading and writing counted."""
    num_bytes = GIB if device == "cuda" else GIB // 8
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    seconds = _median_seconds(lambda: target.copy_(source), device, num_runs=7)
    return 2 * num_bytes / seconds / 1e9


def _median_seconds(run: Callable[[], object], device: str, num_runs: int) -> float:
    times: list[float] = []
    for _ in range(num_runs + 2):
        if device == "cuda":
            start = cuda_calls.record_event()
            run()
            end = cuda_calls.record_event()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


def _triton_launches(device: str) -> Row:
    """Return µs of the host for TritonKernels.forward_reduce, its kernel kept and launched by ``kernel[grid](…)``."""
    x = torch.zeros(8, 8, 4, 4, device=device)
    kept, other = (triton.kernels_for(x, None, None, None, None) for _ in range(2))
    name = "TritonKernels.forward_reduce, µs of the host"
    if kept is None or other is None:
        return {name: "not served by triton here; the part phases says why"}
    from syncbn.ops.triton.kernels import forward_reduce

    with mock.patch.object(forward_reduce, "warmup", return_value=None) as warmup:
        other.forward_reduce(x)  # finds nothing to keep, and goes Triton's public way
    if not warmup.called:
        raise AssertionError("expected TritonKernels to compile by warmup")
    return {
        name: _host_cost(lambda: kept.forward_reduce(x), device),
        "the same by kernel[grid](…), µs of the host": _host_cost(lambda: other.forward_reduce(x), device),
    }


def _host_cost(run: Callable[[], object], device: str) -> float:
    """Return µs of host time for ``run``, which launches one small thing."""
    times = []
    for _ in range(7):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(_NUM_LAUNCHES):
            run()
        times.append((time.perf_counter() - begin) / _NUM_LAUNCHES)
    return 1e6 * statistics.median(times[1:])


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
