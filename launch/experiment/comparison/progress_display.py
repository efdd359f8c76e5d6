"""Show the progress of a comparison: finished and running cells, and the remaining time."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from statistics import mean
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from experiment.comparison.cell import Cell
from experiment.comparison.runner import Running

Rows = Mapping[str, dict[str, Any]]


def watch(running: Iterable[list[Running]], cells: Sequence[Cell], rows: Rows, console: Console) -> None:
    """Draw a table while `running` yields; where the output is no terminal, print a line per finished cell.

    Args:
        running: What runs, a few times a second.
        cells: The grid.
        rows: The rows by cell id, growing while it runs.
        console: To draw on.
    """
    before, printed = set(rows), set(rows)
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for now in itertools.chain(running, [[]]):
            for row in [rows[cell.id] for cell in cells if cell.id in rows and cell.id not in printed]:
                printed.add(row["cell"])
                done = sum(cell.id in printed for cell in cells)
                console.print(f"{done}/{len(cells)} {_outcome(row)}", markup=False, highlight=False, soft_wrap=True)
            fresh = [row["seconds"] for cell, row in rows.items() if cell not in before]
            if console.is_terminal:
                live.update(Group(_matrix(cells, rows, now), _status(cells, rows, now, fresh)), refresh=True)


def _outcome(row: dict[str, Any]) -> str:
    if row["status"] == "failed":
        return f"{row['cell']}: failed: {row['reason']}"
    error = _error(row)
    how = "no number" if error is None else f"{100 * error:.1f} %"
    images = "test" if row.get("candidate") is None else "validation"
    return f"{row['cell']}: {images} error {how}, {row['seconds']:.0f} s"


def _error(row: dict[str, Any]) -> float | None:
    first: dict[str, float | None] = next(iter(row["evaluations"].values()))
    return first["test_error" if row.get("candidate") is None else "val_error"]


def _matrix(cells: Sequence[Cell], rows: Rows, running: Sequence[Running]) -> Table:
    """Lay out lines x batch sizes: cells done, and their mean test error so far."""
    points = sorted({(cell.world_size, cell.per_rank_batch_size) for cell in cells})
    table = Table("test error so far", title="cells", title_justify="left")
    for world_size, per_rank in points:
        table.add_column(f"{per_rank} x {world_size} ranks", justify="right")
    for label in dict.fromkeys(cell.label for cell in cells):
        columns = [
            [cell for cell in cells if (cell.label, cell.world_size, cell.per_rank_batch_size) == (label, *point)]
            for point in points
        ]
        table.add_row(Text(label), *(_entry(column, rows, running) for column in columns))
    return table


def _entry(cells: Sequence[Cell], rows: Rows, running: Sequence[Running]) -> Text:
    found = [rows[cell.id] for cell in cells if cell.id in rows]
    done = [_error(row) for row in found if row["status"] == "done"]
    errors = [error for error in done if error is not None]
    text = Text(f"{100 * mean(errors):.1f} % " if errors else "")
    text.append(f"{len(done)}/{len(cells)}", style="dim")
    if len(done) < len(found):
        text.append(f" {len(found) - len(done)} failed", style="red")
    if any(r.cell in cells for r in running):
        text.append(" *", style="bold")
    return text


def _status(cells: Sequence[Cell], rows: Rows, running: Sequence[Running], fresh: list[float]) -> Text:
    done = sum(cell.id in rows for cell in cells)
    active = ", ".join(f"{r.cell.id} {r.progress:.0%}" for r in running)
    known = fresh or [r.seconds / r.progress for r in running if r.progress > 0.05]
    left = ""
    if known:
        cells_left = len(cells) - done - sum(r.progress for r in running)
        seconds = max(0.0, cells_left) * mean(known) / max(1, len(running))
        left = f", about {timedelta(seconds=round(seconds))} left"
    return Text(f"{done} of {len(cells)} cells done{left}; running: {active or 'none'}")
