"""Part `launches`: the kernels and copies of one layer, forward and backward, beside torch's layers."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from . import cuda_calls
from .inputs import OPERATORS, cases, draw, full, make_layer, name_of, refuse_reference, run_layer, within
from .process_groups import fake_group
from .result import Outcome, Row, Table

_SHAPE = (8, 64, 28, 28)
_NOT_WORK = (" Sync", "Event Record", "Stream Wait Event", "Activity Buffer Request", "Lazy Function Loading",
             "Instrumentation", "Resource", "Launch Delay")  # fmt: skip
_NO_WORK_ON_CPU = ("empty", "new_empty", "view", "as_strided", "detach", "split", "slice", "select", "expand",
                   "_unsafe", "unbind", "t.", "alias")  # fmt: skip


def measure(device: str) -> Outcome:
    """Count what a step of each layer launches."""
    kinds = ("BatchNorm2d", "SyncBatchNorm", OPERATORS, "syncbn") if device == "cuda" else ("BatchNorm2d", "syncbn")
    failures: list[str] = []
    rows, ours = [], Counter[str]()
    with fake_group():
        for dtype, form in cases((torch.float32, torch.bfloat16)):
            for kind in kinds:
                with within(kind):
                    kernels, passes = _count(kind, dtype, form, device, failures)
                rows.append(_row(kind, dtype, form, kernels, passes))
                if kind == "syncbn":
                    ours = passes[0] + passes[1]
                    if not ours:
                        failures.append(f"{name_of(dtype)}, {form}: syncbn launched nothing")
    launched: list[Row] = [{"name": name[:120], "times": times} for name, times in sorted(ours.items())]
    note = (
        "All-reduces over the fake group launch nothing, its gather one kernel. Expected of triton: 2 and 2."
        if device == "cuda" else
        "On a CPU: operators. Where somebody counts them the C++ kernels stand back; nn.SyncBatchNorm refuses CPUs."
    )  # fmt: skip
    *others, last = rows[-len(kinds) :]
    summary = f"syncbn on {last['back end']} {last['forward']} forward, {last['backward']} backward"
    for row in reversed(others):
        name = row["layer"] if row["layer"] == OPERATORS else f"nn.{row['layer']}"
        summary += f"; {name} {row['forward']} and {row['backward']}"
    tables = [Table("Launches of a layer", rows, note), Table("What syncbn launches, the last row", launched)]
    return Outcome(summary, tables, failures)


def _row(kind: str, dtype: torch.dtype, form: str, kernels: str, passes: list[Counter[str]]) -> Row:
    row: Row = {"layer": kind, "dtype": name_of(dtype), "format": form, "back end": kernels}
    for name, names in zip(("forward", "backward"), passes, strict=True):
        row[name] = sum(names.values())
    both = passes[0] + passes[1]
    row["of these copies"] = sum(times for name, times in both.items() if name.startswith("Memcpy"))
    row["to the host"] = sum(times for name, times in both.items() if name.startswith("Memcpy DtoH"))
    return row


def _count(
    kind: str, dtype: torch.dtype, form: str, device: str, failures: list[str]
) -> tuple[str, list[Counter[str]]]:
    """Return the back end, if it is a layer of ours, and what runs forward, and what runs backward."""
    layer = make_layer(kind, _SHAPE[1], device, full(dtype))
    x, dy = (draw(_SHAPE, dtype, device, form, seed=i) for i in range(2))
    x.requires_grad_()
    kernels = ""
    if kind in ("syncbn", OPERATORS):
        kernels = refuse_reference(layer, x.detach(), failures) if device == "cuda" else "reference"
    for _ in range(3):  # checks and caches of the first calls
        run_layer(layer, x, dy)
    count = _launched if device == "cuda" else _operators
    outputs: list[Tensor] = []
    forward = count(lambda: outputs.append(layer(x)))
    return kernels, [forward, count(lambda: torch.autograd.grad(outputs[0], [x, *layer.parameters()], dy))]


def _operators(run: Callable[[], object]) -> Counter[str]:
    return Counter(name for name in cuda_calls.operators(run) if not name.startswith(_NO_WORK_ON_CPU))


def _launched(run: Callable[[], object]) -> Counter[str]:
    """Return the kernels, copies and fills that ran on the GPU, by name."""
    from torch.autograd.profiler_util import DeviceType  # type: ignore[attr-defined]
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() or () if e.device_type == DeviceType.CUDA]
    if not events:
        raise RuntimeError("the profiler saw nothing on the GPU: CUPTI is missing, or may not be used on this machine")
    return Counter(
        event.name
        for event in events
        if not getattr(event, "is_user_annotation", False) and not any(word in event.name for word in _NOT_WORK)
    )
