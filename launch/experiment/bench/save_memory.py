"""What `syncbn.save_memory` saves and costs: bytes kept for backward, peak and time of a training step, per model."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

import syncbn
from experiment.bench import memory, spawn, timing
from experiment.bench.tables import Table, spread
from experiment.training.models import classifiers
from experiment.training.models.unet import UNet

Row = dict[str, Any]
PLAIN, SAVING = CONTENDERS = "plain", "saving"


def measure(config: DictConfig) -> list[Row]:
    """Measure each model with nn.BatchNorm, without `save_memory` and with it, in processes of their own.

    Returns:
        Rows of `model`, `contender`, `saved` (bytes kept for backward, parameters left out), `peak` (bytes above what
        the process had before the step), and what `timing.summarize` says.
    """
    setting, rows = spawn.Setting(config.timeout, config.device, config.threads, fake=True), []
    for name in config.save_memory.models:
        sizes = {kind: spawn.run(_sizes, 1, setting, config, name, kind)[0] for kind in CONTENDERS}
        [times] = spawn.run(_times, 1, setting, config, name)
        for row in timing.summarize(times, (PLAIN,)):
            saved, peak = sizes[row["contender"]]
            rows.append({"model": name, "saved": saved, "peak": peak, **row})
    return rows


def _make(config: DictConfig, name: str, kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = UNet() if name == "unet" else classifiers.torchvision(name, 1000)
    part = config.save_memory
    images = torch.randn(part.per_rank_batch_size, 3, part.image_size, part.image_size, device=config.device)
    model = model.to(config.device)
    return syncbn.save_memory(model) if kind == SAVING else model, images


def _step(model: nn.Module, images: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()

    return step


def _sizes(config: DictConfig, name: str, kind: str) -> tuple[int, int]:
    """Measure in a process of its own, in which nothing was larger before."""
    memory.return_freed_memory_at_once()
    model, images = _make(config, name, kind)
    _step(model, images[..., :32, :32])()  # the first step of all tries the formulas
    step = _step(model, images)
    before = memory.peak(config.device)
    step()
    peak = memory.peak(config.device) - before
    return memory.saved_bytes(lambda: model(images), model.parameters()), peak


def _times(config: DictConfig, name: str) -> timing.Times:
    steps = {kind: _step(*_make(config, name, kind)) for kind in CONTENDERS}
    return timing.interleave(steps, config.save_memory.rounds, device=config.device)


def tabulate(rows: Sequence[Row]) -> list[Table]:
    """Lay out all models, with over without."""
    lines = []
    for name in dict.fromkeys(row["model"] for row in rows):
        pair = [row for row in rows if row["model"] == name]
        saved, peaks = ([row[key] / memory.MIB for row in pair] for key in ("saved", "peak"))
        cells = [f"{x:.1f}" for x in saved] + [f"{saved[1] / saved[0]:.2f}"]
        cells += [f"{x:.0f}" for x in peaks] + [f"{peaks[1] / peaks[0]:.2f}"]
        lines.append([name, *cells, spread(pair[1]["ratios"][PLAIN])])
    columns = ["model", "kept, MiB", "save_memory", "ratio", "peak, MiB", "save_memory", "ratio", "time, ratio"]
    note = (
        "Kept for backward: storages, each once, without parameters. Peak: resident memory of a training step above "
        "the highest before it, of a step on smaller images."
    )
    return [Table("Memory with save_memory", columns, lines, note)]
