"""Part `step`: a training step of a ResNet-50 with each norm, its time and its memory.

All models live in one process under a fake group of 8, and step in turn within every round: what differs is the norm.
Gradients are not averaged, as DistributedDataParallel would.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import syncbn
from experiment.bench import timing

from .inputs import FORMATS, draw, make_layer, refuse_reference
from .process_groups import fake_group
from .resnet import ResNet50
from .result import Outcome, Row, Table

_MIB = 2**20


class Setting(NamedTuple):
    """What is trained: a batch, a precision ("float32" or "bfloat16" by autocast), a memory format, a model."""

    batch_size: int
    height: int
    width: int
    precision: str
    form: str
    channels: int = 64
    is_backbone: bool = False


_IMAGES = ((2, 224, 224), (8, 224, 224), (32, 224, 224), (2, 800, 1344))  # the last as a detector's
_PRECISIONS = (("float32", "contiguous"), ("bfloat16", "contiguous"), ("bfloat16", "channels_last"))
_SETTINGS = {
    "cuda": [Setting(*i, *p, is_backbone=i[1] == 800) for i in _IMAGES for p in _PRECISIONS],
    "cpu": [Setting(1, 64, 64, "float32", "contiguous", 8), Setting(1, 64, 64, "bfloat16", "channels_last", 8)],
}
_ROUNDS = {"cuda": 9, "cpu": 3}


def measure(device: str) -> Outcome:
    """Time every setting; one that fails, as for memory, is a failure, and the others go on."""
    kinds = ("BatchNorm2d", "SyncBatchNorm", "syncbn") if device == "cuda" else ("BatchNorm2d", "syncbn")
    rows: list[Row] = []
    failures: list[str] = []
    with fake_group():
        for setting in _SETTINGS[device]:
            label = f"{setting.batch_size}x3x{setting.height}x{setting.width}, {setting.precision}, {setting.form}"
            try:
                kernels = _back_end(setting, device, failures)
                rows.append({"images": label, "back end": kernels, **_measure(setting, kinds, device)})
            except RuntimeError as error:
                failures.append(f"{label}: {type(error).__name__}: {str(error).splitlines()[0]}")
            if device == "cuda":
                torch.cuda.empty_cache()
    ratios = {
        kind: timing.geometric_mean([row[f"to {kind}"][1] for row in rows]) if rows else float("nan")
        for kind in kinds[:-1]
    }
    summary = f"{len(rows)} settings; time to " + ", ".join(f"nn.{kind} {ratio:.2f}" for kind, ratio in ratios.items())
    note = "ms: median (quartiles) over rounds; ratios of syncbn's within a round. Peak: memory of a step, in MiB"
    note += ", beyond the models." if device == "cuda" else ", on a GPU only. nn.SyncBatchNorm refuses CPUs."
    return Outcome(summary, [Table("Training step of a ResNet-50", rows, note)], failures)


def _measure(setting: Setting, kinds: Sequence[str], device: str) -> Row:
    steps = {kind: _make_step(setting, kind, device) for kind in kinds}
    times = timing.interleave(steps, _ROUNDS[device], device=device)
    row: Row = {f"{kind}, ms": [1e3 * seconds for seconds in timing.quartiles(times[kind])] for kind in kinds}
    row |= {f"to {kind}": list(timing.quartiles(timing.ratios(times, "syncbn", kind))) for kind in kinds[:-1]}
    if device == "cuda":
        row |= {f"{kind}, peak": _peak(step) for kind, step in steps.items()}
    return row


def _back_end(setting: Setting, device: str, failures: list[str]) -> str:
    """Return what serves the first norm."""
    shape = setting.batch_size, setting.channels, setting.height // 2, setting.width // 2
    dtype = torch.bfloat16 if setting.precision == "bfloat16" else torch.float32
    x = torch.empty(shape, dtype=dtype, device=device, memory_format=FORMATS[setting.form])
    return refuse_reference(make_layer("syncbn", setting.channels, device, torch.float32), x, failures)


def _make_step(setting: Setting, kind: str, device: str) -> Callable[[], object]:
    """Return what trains a model one step: forward, backward, SGD."""
    torch.manual_seed(0)
    model: nn.Module = ResNet50(setting.channels, setting.is_backbone)
    if kind == "SyncBatchNorm":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    elif kind == "syncbn":
        model = syncbn.convert(model)
    model = model.to(device, memory_format=FORMATS[setting.form])  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    images = draw((setting.batch_size, 3, setting.height, setting.width), torch.float32, device, setting.form)
    loss = _make_loss(setting, device)
    autocast: Any = torch.autocast(device, torch.bfloat16, enabled=setting.precision == "bfloat16")

    def step() -> None:
        optimizer.zero_grad()
        with autocast:
            outputs = model(images)
        loss(outputs).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _make_loss(setting: Setting, device: str) -> Callable[[Tensor], Tensor]:
    labels = torch.arange(setting.batch_size, device=device)
    weights: list[Tensor] = []  # of a feature map, made when its shape is known

    def loss(outputs: Tensor) -> Tensor:
        if not setting.is_backbone:
            return F.cross_entropy(outputs.float(), labels)
        if not weights:
            weights.append(draw(outputs.shape, torch.float32, device))
        return (outputs.float() * weights[0]).mean()

    return loss


def _peak(step: Callable[[], object]) -> float:
    """Return the most memory that a step has beyond what it started with, gradients of the last step given back."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / _MIB
