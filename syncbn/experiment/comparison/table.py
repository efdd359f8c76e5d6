"""The report in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from syncbn.experiment.comparison.points import REFERENCE, Points, Row
from syncbn.experiment.comparison.statistics import Interval
from syncbn.experiment.comparison.words import count, percent, with_half


def print_table(rows: Sequence[Row], console: Console | None = None) -> None:
    """Print test errors in %, arms against per-rank batch sizes, and their paired differences to syncbn."""
    console = console or Console()
    points = Points.of(rows)
    for world_size in points.world_sizes:
        ranks = count(world_size, "rank")
        console.print(f"\n{ranks}: test error in % with {points.mode} statistics, mean ± 95 % interval over seeds")
        console.print(_errors(points, world_size))
        if any(line.world_size == world_size for line in points.differences()):
            console.print(f"{ranks}: difference to {REFERENCE} in points, paired over seeds; is it real?")
            console.print(_differences(points, world_size))
    if not points.done:
        console.print("No cell has finished.")
    if points.failed:
        console.print(Text(f"{count(len(points.failed), 'cell')} failed:"))
        for row in points.failed:
            console.print(Text(f"  {row['cell']}: {row.get('reason')}"))


def _errors(points: Points, world_size: int) -> Table:
    table, batches = _table(points, world_size)
    for label in points.labels:
        means = [points.mean(label, world_size, batch, points.mode) for batch in batches]
        if any(means):
            table.add_row(Text(label), *(_cell(mean, "") for mean in means))
    return table


def _differences(points: Points, world_size: int) -> Table:
    table, batches = _table(points, world_size)
    lines = {(d.label, d.batch): d for d in points.differences() if d.world_size == world_size}
    for label in points.labels:
        found = [lines.get((label, batch)) for batch in batches]
        if any(found):
            table.add_row(Text(label), *(_cell(d.interval, d.verdict, sign=True) if d else "" for d in found))
    return table


def _cell(interval: Interval | None, below: str, *, sign: bool = False) -> str:
    """Write the number, and n or the verdict below it."""
    if interval is None:
        return ""
    if interval.half is None:
        return f"{percent(interval.mean, sign=sign)}\nn = 1"
    return f"{with_half(interval, sign=sign)}\n{below or f'n = {interval.n}'}".replace("± ", "±")  # in narrow columns


def _table(points: Points, world_size: int) -> tuple[Table, list[int]]:
    batches = points.batches(world_size)
    columns = [Column(f"{batch} per rank", justify="right") for batch in batches]
    return Table(Column("arm", overflow="fold"), *columns), batches
