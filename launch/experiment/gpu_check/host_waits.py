"""Part `host_waits`: nothing in a training step of our layer makes the host wait for the GPU.

Twice on a GPU: torch's own mode that refuses operators which wait, which does not see those of torch.distributed; and
a GPU kept busy, behind which the host must come back at once. On a CPU the operators that read values are counted.
"""

import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import syncbn

from . import cuda_calls
from .inputs import cases, draw, full, make_layer, name_of, refuse_reference, run_layer
from .process_groups import fake_group, group_of_one
from .result import Outcome, Row, Table

_SHAPE = (4, 32, 14, 14)
_OPTIONS: tuple[dict[str, Any], ...] = ({}, {"momentum": None}, {"affine": False}, {"track_running_stats": False})
_READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "index.Tensor", "unique", "equal")
_SLEEP = 400_000_000  # cycles, some 0.2 s: a step takes the host far less
_LIBRARY = str(Path(syncbn.__file__).parent)
_TEXT = "called a synchronizing CUDA operation"


def measure(device: str) -> Outcome:
    """Count the waits of our layer in both groups, and those of nn.SyncBatchNorm for comparison."""
    failures: list[str] = []
    rows = []
    groups: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "of one": lambda: group_of_one(device),
        "fake, of 8": fake_group,
    }
    for name, group in groups.items():
        with group():
            for dtype, form in cases((torch.float32, torch.bfloat16)):
                rows += [_ours(name, dtype, form, options, device, failures) for options in _OPTIONS]
    summary = f"no wait in {len(rows)} cases"
    note = "On a CPU: operators that read values back, of the reference kernels, which serve other devices."
    if device == "cuda":
        with fake_group():
            rows += [_torchs(dtype, form) for dtype, form in cases((torch.float32, torch.bfloat16))]
        summary += f"; nn.SyncBatchNorm waits {rows[-1]['waits']} times a step"
        note = "A step is forward and backward."
    return Outcome(summary, [Table("Waits of the host in a step", rows, note)], failures)


def _ours(group: str, dtype: torch.dtype, form: str, options: dict[str, Any], device: str, failures: list[str]) -> Row:
    layer, x, dy = _make("syncbn", dtype, form, device, options)
    kernels = refuse_reference(layer, x.detach(), failures) if device == "cuda" else "reference"
    waits = _waits(layer, x, dy) if device == "cuda" else _reads(layer, x, dy)
    row = {"layer": "syncbn", "group": group, "dtype": name_of(dtype), "format": form, "options": str(options or "")}
    label = f"group {group}, {row['dtype']}, {form} {row['options']}".strip()
    failures += [f"{label}: {wait}" for wait in waits]
    return row | {"back end": kernels, "waits": len(waits)}


def _make(
    kind: str, dtype: torch.dtype, form: str, device: str, options: dict[str, Any]
) -> tuple[nn.Module, Tensor, Tensor]:
    layer = make_layer(kind, _SHAPE[1], device, full(dtype), **options)
    x, dy = (draw(_SHAPE, dtype, device, form, seed=i) for i in range(2))
    return layer, x.requires_grad_(), dy


def _waits(layer: nn.Module, x: Tensor, dy: Tensor) -> list[str]:
    """Return where a step waits: the place that torch's mode refuses, and whether it outlasts a busy GPU."""
    for _ in range(3):  # checks and caches of the first calls
        run_layer(layer, x, dy)
    waits = []
    try:
        with _sync_debug("error"):
            run_layer(layer, x, dy)
    except RuntimeError as error:
        if _TEXT not in str(error):
            raise
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(_LIBRARY)]
        last = frames[-1] if frames else None
        waits.append(f"{_TEXT}{f', {last.filename}:{last.lineno}: {last.line}' if last else ''}")
    torch.cuda.synchronize()
    cuda_calls.sleep(_SLEEP)
    busy = cuda_calls.record_event(timing=False)
    begin = time.perf_counter()
    run_layer(layer, x, dy)
    if busy.query():  # type: ignore[no-untyped-call]  # the sleep is over: the host has waited for it
        waits.append(f"the host came back after {time.perf_counter() - begin:.2f} s, when a busy GPU was done")
    torch.cuda.synchronize()
    return waits


@contextmanager
def _sync_debug(mode: str) -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _torchs(dtype: torch.dtype, form: str) -> Row:
    """Count the waits of nn.SyncBatchNorm, as torch warns of them."""
    layer, x, dy = _make("SyncBatchNorm", dtype, form, "cuda", {})
    for _ in range(3):
        run_layer(layer, x, dy)
    with warnings.catch_warnings(record=True) as caught, _sync_debug("warn"):
        warnings.simplefilter("always")
        run_layer(layer, x, dy)
    waits = sum(_TEXT in str(warning.message) for warning in caught)
    return {"layer": "nn.SyncBatchNorm", "group": "fake, of 8", "dtype": name_of(dtype), "format": form, "options": "",
            "back end": "", "waits": waits}  # fmt: skip


def _reads(layer: nn.Module, x: Tensor, dy: Tensor) -> list[str]:
    """Return the operators that read values back to the host."""
    with syncbn.use_kernels("reference"):
        names = cuda_calls.operators(lambda: run_layer(layer, x, dy))
    if not names:
        raise AssertionError("expected a step to run operators, saw none")
    return [f"reads a value back: {name}" for name in names if name.startswith(_READS)]
