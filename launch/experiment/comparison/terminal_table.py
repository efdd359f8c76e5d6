"""The results as a table in the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from experiment.comparison.formatting import MINUS, count, percent, with_half
from experiment.comparison.plan import Plan
from experiment.comparison.results_table import Difference, ResultsTable, Row
from experiment.comparison.statistics import Interval


def print_table(rows: Sequence[Row], console: Console | None = None, plan: Plan | None = None) -> None:
    """Print test errors in %, arms against per-rank batch sizes, and what the planned comparisons come to."""
    console = console or Console()
    results, plan = ResultsTable.of(rows), plan or Plan()
    for world_size in results.world_sizes:
        ranks = count(world_size, "rank")
        console.print(f"\n{ranks}: test error in % with {results.mode} statistics, mean ± 95 % interval over seeds")
        console.print(_errors(results, world_size))
    if planned := plan.differences(results):
        console.print("\ncomparisons stated beforehand: difference in points, paired over seeds")
        console.print(_planned(planned, plan))
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
            table.add_row(Text(label), *map(_cell, means))
    return table


def _planned(lines: Sequence[Difference], plan: Plan) -> Table:
    table = Table("arms", Column("per rank x ranks", justify="right"), Column("difference", justify="right"), "result")
    for line in lines:
        arms = f"{line.label} {MINUS} {line.against}"
        point = f"{line.batch} x {line.world_size}"
        table.add_row(Text(arms), point, with_half(line.interval, sign=True), plan.verdict(line))
    return table


def _cell(interval: Interval | None) -> str:
    """Write the number, and n below it."""
    if interval is None:
        return ""
    if interval.half is None:
        return f"{percent(interval.mean)}\nn = 1"
    return f"{with_half(interval)}\nn = {interval.n}".replace("± ", "±")  # in narrow columns


def _table(results: ResultsTable, world_size: int) -> tuple[Table, list[int]]:
    batches = results.batches(world_size)
    columns = [Column(f"{batch} per rank", justify="right") for batch in batches]
    return Table(Column("arm", overflow="fold"), *columns), batches
