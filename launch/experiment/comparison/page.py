"""The report as one self-contained HTML page, with its plots and tables as files beside it."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiment.comparison import export, formatting, plots
from experiment.comparison.conclusions import draw_conclusions
from experiment.comparison.curves import training_lines
from experiment.comparison.plan import Plan
from experiment.comparison.results_table import REFERENCE, ResultsTable, Row
from experiment.comparison.selection_table import how_chosen, selection_lines
from experiment.comparison.settings import MODES, settings, warnings
from experiment.comparison.statistics import Interval, mean_interval
from experiment.pages.figures import DARK, LIGHT
from experiment.pages.html import InlineFigure, templates, write_figure
from experiment.training.atomic_files import write_file

TEMPLATE = "page.html.jinja"


def write_report(
    rows: Sequence[Row], folder: Path, *, title: str, command: str, plan: Plan | None = None, missing: int = 0
) -> Path:
    """Write `index.html`, `results.csv`, `summary.csv` and `plots/` into `folder`; equal rows give equal files.

    Args:
        rows: one per cell, as in the results file, in any order.
        folder: made if it is not there; files of these names are replaced.
        title: heading of the page.
        command: that runs the whole grid.
        plan: what was stated before the runs to be tested; None for nothing.
        missing: number of cells of the grid that have no row.

    Returns:
        The page's path.
    """
    results, plan = ResultsTable.of(rows), plan or Plan()
    cells = [*results.done, *results.failed]
    every = [*cells, *results.candidates]
    tables = {"results.csv": export.results_csv(every), "summary.csv": export.summary_csv(results)}
    curves = [_error_plot(results, world_size, folder) for world_size in results.world_sizes]
    trainings = _training_plots(results, folder)
    page = (
        templates(Path(__file__).parent)
        .get_template(TEMPLATE)
        .render(
            title=title,
            command=command,
            results=results,
            reference=REFERENCE,
            conclusions=draw_conclusions(results, plan),
            selection=selection_lines(results),
            how_chosen=how_chosen(results),
            plan=plan,
            planned=(planned := plan.differences(results)),
            differences=results.differences(planned),
            warnings=warnings(results, missing),
            settings=settings(results) if results.done else [],
            curves=curves,
            trainings=trainings,
            changes=[
                line for w in results.world_sizes for label in results.labels for line in results.changes(label, w)
            ],
            costs=_costs(results),
            cells=every,
            downloads={name: _data_uri(text) for name, text in tables.items()},
            modes=MODES,
            minus=formatting.MINUS,
            formatting=formatting,
        )
    )
    for name, text in {**tables, "index.html": page}.items():
        write_file(folder / name, text)
    return folder / "index.html"


def _error_plot(results: ResultsTable, world_size: int, folder: Path) -> InlineFigure:
    name = f"error_{world_size}_ranks"
    figures = [plots.error_curve(results, world_size, theme) for theme in (LIGHT, DARK)]
    means = [f"{label}: {_describe_curve(results, label, world_size)}" for label in results.labels]
    title = f"Test error in % against images per rank, {formatting.count(world_size, 'rank')}. {'; '.join(means)}"
    caption = (
        f"Test error with {results.mode} statistics, {formatting.count(world_size, 'rank')}: mean over seeds, band: "
        f"95 % interval by Student's t. Numbers: summary.csv, world_size {world_size}, mode {results.mode}."
    )
    if results.once_per_seed:
        caption += f" Run once per seed, since the batch does not enter: {', '.join(results.once_per_seed)}."
    return write_figure(name, figures, title, caption, folder)


def _describe_curve(results: ResultsTable, label: str, world_size: int) -> str:
    means = {b: results.mean(label, world_size, b, results.mode) for b in results.batches(world_size, label)}
    return ", ".join(
        f"{formatting.percent(mean.mean)} at {batch}" for batch, mean in means.items() if mean is not None
    )


def _training_plots(results: ResultsTable, folder: Path) -> list[InlineFigure]:
    """Draw one small figure per world size and batch, all with one loss axis."""
    keys = [(world_size, batch) for world_size in results.world_sizes for batch in results.batches(world_size)]
    found = {key: training_lines(results, *key) for key in keys}
    shared = [loss for lines in found.values() for line in lines for loss in line.y]
    drawn = []
    for (world_size, batch), lines in found.items():
        if not lines:
            continue
        title = f"{formatting.count(batch, 'image')} per rank, {formatting.count(world_size, 'rank')}"
        figures = [plots.training_curve(lines, title, shared, theme) for theme in (LIGHT, DARK)]
        labels = ", ".join(line.name for line in lines)
        name = f"loss_{world_size}_ranks_{batch}_per_rank"
        drawn.append(write_figure(name, figures, f"Training loss against step, {title}: {labels}", title, folder))
    return drawn


def _costs(results: ResultsTable) -> list[tuple[str, int, int, dict[str, Interval | None]]]:
    """Average what the cells took, over seeds."""
    lines = []
    for world_size in results.world_sizes:
        for label in results.labels:
            batches = results.batches(world_size, label)
            once = label in results.once_per_seed
            for batch in [results.cells(label, world_size, batches[0])[0]["per_rank_batch_size"]] if once else batches:
                cells = results.cells(label, world_size, batch)
                names = ("seconds", "training_seconds", "images_per_second")
                lines.append((label, world_size, batch, {name: _mean(cells, name) for name in names}))
    return lines


def _mean(cells: Sequence[Row], name: str) -> Interval | None:
    values: list[Any] = [row[name] for row in cells if row.get(name) is not None]
    return mean_interval(values) if values else None


def _data_uri(text: str) -> str:
    return "data:text/csv;charset=utf-8;base64," + base64.b64encode(text.encode("utf-8", "backslashreplace")).decode()
