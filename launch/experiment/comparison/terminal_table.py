"""The results as a table in the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from experiment.comparison.formatting import count, percent, with_half
from experiment.comparison.results_table import REFERENCE, ResultsTable, Row
from experiment.comparison.statistics import Interval


def print_table(rows: Sequence[Row], console: Console | None = None) -> None:
    """Print test errors in %, arms against per-rank batch sizes, and their paired differences to syncbn."""
    console = console or Console()
    results = ResultsTable.of(rows)
    for world_size in results.world_sizes:
        ranks = count(world_size, "rank")
        console.print(f"\n{ranks}: test error in % with {results.mode} statistics, mean ± 95 % interval over seeds")
        console.print(_errors(results, world_size))
        if any(line.world_size == world_size for line in results.differences()):
            console.print(f"{ranks}: difference to {REFERENCE} in points, paired over seeds; is it real?")
            console.print(_differences(results, world_size))
    if not results.done:
        console.print("No cell has finished.")
    if results.failed:
        console.print(Text(f"{count(len(results.failed), 'cell')} failed:"))
        for row in results.failed:
            console.print(Text(f"  {row['cell']}: {row.get('reason')}"))


def _errors(results: ResultsTable, world_size: int) -> Table:
    table, batches = _table(results, world_size)
    for label in results.labels:
        means = [results.mean(label, world_size, batch, results.mode) for batch in batches]
        if any(means):
            table.add_row(Text(label), *(_cell(mean, "") for mean in means))
    return table


def _differences(results: ResultsTable, world_size: int) -> Table:
    table, batches = _table(results, world_size)
    lines = {(d.label, d.batch): d for d in results.differences() if d.world_size == world_size}
    for label in results.labels:
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


def _table(results: ResultsTable, world_size: int) -> tuple[Table, list[int]]:
    batches = results.batches(world_size)
    columns = [Column(f"{batch} per rank", justify="right") for batch in batches]
    return Table(Column("arm", overflow="fold"), *columns), batches
