"""Time a training step of a whole model on real ranks, with and without synchronization.

Each rank has a model of its own per contender: gradients are not averaged, so that the time is that of the norm layers
and not of DistributedDataParallel.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import nn

from experiment.bench import spawn, timing
from experiment.bench.contenders import CONTENDERS, base_for, count_graph_breaks, prepare
from experiment.bench.tables import Table, spread
from experiment.training.instantiate import instantiate
from syncbn import use_kernels

Row = dict[str, Any]
BASES = ("bare", "plain", "bare_compiled", "plain_compiled")
NUM_CLASSES = 1000


def measure(config: DictConfig) -> list[Row]:
    """Time training steps of every contender, all ranks on the same one at a time; the slowest rank counts.

    Returns:
        Rows of what `timing.summarize` says, and `graph_breaks`, None for what is not compiled.
    """
    setting = spawn.Setting(config.timeout, config.device, config.threads)
    answers = spawn.run(_on_rank, config.step.world_size, setting, config)
    times = timing.slowest([times for times, _ in answers])
    breaks = answers[0][1]
    rows = timing.summarize(times, BASES)
    return [{**row, "graph_breaks": breaks[row["contender"]]} for row in rows]


def _on_rank(config: DictConfig) -> tuple[timing.Times, dict[str, int | None]]:
    steps = {name: _make(config, name) for name in config.step.contenders}
    graph_breaks = {name: count_graph_breaks(name, step) for name, step in steps.items()}
    return timing.interleave(steps, config.step.rounds, _together, config.device), graph_breaks


@contextmanager
def _together(name: str) -> Iterator[None]:
    """Choose the kernels, then wait for the other ranks."""
    with use_kernels(CONTENDERS[name].kernels):
        dist.barrier()
        yield


def _make(config: DictConfig, name: str) -> Callable[[], object]:
    torch.manual_seed(0)
    model: nn.Module = instantiate(config.model, num_classes=NUM_CLASSES, in_channels=3)
    model = prepare(name, model, config.device)
    torch.manual_seed(dist.get_rank())
    return make_step(model, config.step.per_rank_batch_size, config.step.image_size, config.device)


def make_step(model: nn.Module, batch_size: int, image_size: int, device: str) -> Callable[[], object]:
    """Return what trains ``model`` one step on random images and labels: forward, backward, SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    images = torch.randn(batch_size, 3, image_size, image_size, device=device)
    labels = torch.randint(NUM_CLASSES, (batch_size,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def tabulate(rows: Sequence[Row]) -> list[Table]:
    """Lay out times and ratios by contender."""
    lines = [
        [
            CONTENDERS[row["contender"]].label,
            spread(row["ms"], digits=1),
            *(spread(row["ratios"].get(base_for(row["contender"], base))) for base in ("bare", "plain")),
            spread(row["ratios"].get("plain")),
            "" if row["graph_breaks"] is None else str(row["graph_breaks"]),
        ]
        for row in rows
    ]
    columns = ["", "ms", "to bare all_reduces", "to nn.BatchNorm", "to eager nn.BatchNorm", "graph breaks"]
    note = (
        "Median (quartiles) of the slowest rank's time and of the ratios within a round, of compiled ones to compiled "
        "ones but in the column that says eager. Without DDP."
    )
    if not any(line[-1] for line in lines):
        columns, lines = columns[:-1], [line[:-1] for line in lines]
    return [Table("Training step", columns, lines, note)]
