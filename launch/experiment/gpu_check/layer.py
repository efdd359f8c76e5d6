"""Part `layer`: the time of one layer, forward and backward, beside torch's layers, its operators, and copies.

All run in one process under a fake group of 8, in turn within every round, on inputs that together exceed the cache.
Three times are taken on a GPU: `time` as a training loop sees it, waits of the host included; `device`, by events
behind a sleep that lets the host run ahead, so that the GPU never waits for it; `host`, until the host comes back.
nn.SyncBatchNorm waits for the GPU, so its host never runs ahead, and its `device` holds host work too.

A step passes 8 times over a map: forward reads x twice and writes y, backward reads x and dy twice and writes dx. What
memory allows is therefore the time of 4 copies, of 2 passes each: "copy".
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from experiment.bench import timing

from . import cuda_calls
from .inputs import FORMATS, OPERATORS, cases, full, make_layer, name_of, refuse_reference, run_layer, within
from .process_groups import fake_group
from .result import Outcome, Row, Table

_SHAPES = {  # of a ResNet-50: channels, height and width
    "cuda": ((64, 112), (64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7)),
    "cpu": ((16, 28), (64, 14), (256, 7)),
}
_BATCH_SIZES = {"cuda": (2, 32), "cpu": (2,)}
_ROUNDS = {"cuda": 11, "cpu": 7}
_CALLS = 8  # of a layer in a round, on one input after the other; so few that the GPU's queue takes them all
_CACHE = {"cuda": 60e6, "cpu": 16e6}  # bytes, where the device does not say
_MAX_INPUTS = 160
_SLEEP = 20_000_000  # cycles, some 10 ms: longer than the host takes for the calls of a round
_GOALS = (  # column, limit, smallest map in MB, what it is
    ("to SyncBatchNorm", 0.7, 0.0, "nn.SyncBatchNorm's time"),
    ("to copy, device", 1.25, 16.0, "4 copies on the device"),
)
Passes = Mapping[str, Callable[[], object]]


def measure(device: str) -> Outcome:
    """Time every layer that runs on the device, for all shapes, two dtypes and two memory formats."""
    kinds = ("BatchNorm2d", "SyncBatchNorm", OPERATORS, "syncbn") if device == "cuda" else ("BatchNorm2d", "syncbn")
    rows: list[Row] = []
    failures: list[str] = []
    with fake_group():
        for n in _BATCH_SIZES[device]:
            for channels, size in _SHAPES[device]:
                for dtype, form in cases((torch.float32, torch.bfloat16)):
                    rows.append(_measure((n, channels, size, size), dtype, form, kinds, device, failures))
    bases = [column for column in rows[0] if column.startswith("to ")]
    ratios = [f"{base} {timing.geometric_mean([row[base][1] for row in rows]):.2f}" for base in bases]
    goals = _goals(rows) if device == "cuda" else []
    summary = "; ".join([*goals, f"{len(rows)} cases, geometric means {', '.join(ratios)}"])
    note = "µs for forward and backward: median (quartiles) over rounds; ratios of syncbn's time within a round. "
    note += f"Goals: {'; '.join(goals)}." if device == "cuda" else "nn.SyncBatchNorm refuses CPUs."
    return Outcome(summary, [Table("Layer, forward and backward", rows, note)], failures)


def _goals(rows: list[Row]) -> list[str]:
    """Say of each goal whether it is met in every row it is for."""
    found = []
    for column, limit, smallest, what in _GOALS:
        ratios = [row[column][1] for row in rows if row["MB"] >= smallest]
        num = sum(ratio > limit for ratio in ratios)
        met = f"missed in {num} of {len(ratios)}" if num else "met"
        result = f"{met}, worst {max(ratios):.2f}" if ratios else "not measured"
        of = f" for maps from {smallest:g} MB" if smallest else ""
        found.append(f"at most {limit:g} of {what}{of}: {result}")
    return found


def _measure(
    shape: Sequence[int], dtype: torch.dtype, form: str, kinds: Sequence[str], device: str, failures: list[str]
) -> Row:
    inputs = _draw_inputs(shape, dtype, form, device)
    layers = {kind: make_layer(kind, shape[1], device, full(dtype)) for kind in kinds}
    kernels = refuse_reference(layers["syncbn"], inputs[0][0].detach(), failures)
    passes = {kind: _calls(partial(run_layer, layer), inputs) for kind, layer in layers.items()}
    if device == "cuda":
        passes["copy"] = _copies(inputs)
    times = timing.interleave(passes, _ROUNDS[device], within, device)
    row: Row = {"shape": "x".join(map(str, shape)), "MB": inputs[0][0].nbytes / 1e6, "dtype": name_of(dtype),
                "format": form, "back end": kernels}  # fmt: skip
    for kind in passes:
        row[f"{kind}, time"] = [1e6 / _CALLS * seconds for seconds in timing.quartiles(times[kind])]
    for kind in passes:
        if kind != "syncbn":
            row[f"to {kind}"] = list(timing.quartiles(timing.ratios(times, "syncbn", kind)))
    return row | (_device_and_host(passes, _ROUNDS[device]) if device == "cuda" else {})


def _draw_inputs(shape: Sequence[int], dtype: torch.dtype, form: str, device: str) -> list[tuple[Tensor, Tensor]]:
    """Draw pairs of x and dy that together are more than twice the cache."""
    cache = _CACHE[device]
    if device == "cuda":
        cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or cache
    memory_format = FORMATS[form]
    first = [torch.randn(*shape, device=device).to(dtype, memory_format=memory_format) for _ in range(2)]
    num = min(max(2, math.ceil(2 * cache / (2 * first[0].nbytes))), _MAX_INPUTS)
    return [tuple(t.clone().requires_grad_(i == 0) for i, t in enumerate(first)) for _ in range(num)]  # type: ignore[misc]


def _copies(inputs: list[tuple[Tensor, Tensor]]) -> Callable[[], object]:
    """Return what copies x to a y twice, and dy to a dx twice."""
    y, dx = (torch.empty_like(t) for t in inputs[0])

    def copy(x: Tensor, dy: Tensor) -> None:
        for target, source in ((y, x), (y, x), (dx, dy), (dx, dy)):
            target.copy_(source)

    return torch.no_grad()(_calls(copy, inputs))


def _calls(run_one: Callable[[Tensor, Tensor], object], inputs: list[tuple[Tensor, Tensor]]) -> Callable[[], object]:
    """Return what makes calls on the next inputs; they go round."""
    position = 0

    def run() -> None:
        nonlocal position
        for _ in range(_CALLS):
            run_one(*inputs[position])
            position = (position + 1) % len(inputs)

    return run


def _device_and_host(passes: Passes, num_rounds: int) -> dict[str, Any]:
    """Return the times of the GPU, measured by events behind a sleep, and those of the host, in µs: medians."""
    device: timing.Times = {kind: [] for kind in passes}
    host: timing.Times = {kind: [] for kind in passes}
    for _ in range(num_rounds):
        for kind, run in passes.items():
            torch.cuda.synchronize()
            cuda_calls.sleep(_SLEEP)
            start = cuda_calls.record_event()
            begin = time.perf_counter()
            with within(kind):
                run()
            host[kind].append(time.perf_counter() - begin)
            end = cuda_calls.record_event()
            torch.cuda.synchronize()
            device[kind].append(start.elapsed_time(end) / 1e3)
    to_copy: Row = {"to copy, device": list(timing.quartiles(timing.ratios(device, "syncbn", "copy")))}
    return to_copy | {
        f"{kind}, {what}": 1e6 / _CALLS * timing.quartiles(times[kind]).median
        for kind in passes
        for what, times in (("device", device), ("host", host))
    }
