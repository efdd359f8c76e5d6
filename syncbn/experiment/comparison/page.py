"""The report: one HTML page that needs nothing else, its plots and tables as files beside it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from syncbn.experiment.comparison import files, plots, words
from syncbn.experiment.comparison.answer import answer
from syncbn.experiment.comparison.curves import training_lines
from syncbn.experiment.comparison.images import to_inline_svg, to_png, to_svg
from syncbn.experiment.comparison.points import REFERENCE, Points, Row
from syncbn.experiment.comparison.settings import MODES, settings, warnings
from syncbn.experiment.comparison.statistics import Interval, mean_interval

TEMPLATE = "page.html.jinja"


@dataclass(frozen=True)
class Plot:
    """One figure of the page, drawn for light and for dark."""

    name: str
    caption: str
    light: Markup
    dark: Markup


def write_report(rows: Sequence[Row], folder: Path, *, title: str, command: str, missing: int = 0) -> Path:
    """Write `index.html`, `results.csv`, `summary.csv` and `plots/` into `folder`; equal rows give equal files.

    Args:
        rows: one per cell, as in the results file, in any order.
        folder: made if it is not there; files of these names are replaced.
        title: heading of the page.
        command: that runs the whole grid.
        missing: number of cells of the grid that have no row.

    Returns:
        The page's path.
    """
    points = Points.of(rows)
    cells = [*points.done, *points.failed]
    tables = {"results.csv": files.results_csv(cells), "summary.csv": files.summary_csv(points)}
    curves = [_error_plot(points, world_size, folder) for world_size in points.world_sizes]
    trainings = _training_plots(points, folder)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(TEMPLATE).render(
        title=title,
        command=command,
        points=points,
        reference=REFERENCE,
        answer=answer(points),
        warnings=warnings(points, missing),
        settings=settings(points) if points.done else [],
        curves=curves,
        trainings=trainings,
        changes=[line for w in points.world_sizes for label in points.labels for line in points.changes(label, w)],
        costs=_costs(points),
        cells=cells,
        downloads={name: _data_uri(text) for name, text in tables.items()},
        modes=MODES,
        words=words,
    )
    for name, text in {**tables, "index.html": page}.items():
        files.write(folder / name, text)
    return folder / "index.html"


def _error_plot(points: Points, world_size: int, folder: Path) -> Plot:
    name = f"error_{world_size}_ranks"
    figures = [plots.error_curve(points, world_size, theme) for theme in (plots.LIGHT, plots.DARK)]
    means = [f"{label}: {_curve_in_words(points, label, world_size)}" for label in points.labels]
    title = f"Test error in % against images per rank, {words.count(world_size, 'rank')}. {'; '.join(means)}"
    caption = (
        f"Test error with {points.mode} statistics, {words.count(world_size, 'rank')}: mean over seeds, band: 95 % "
        f"interval by Student's t. Numbers: summary.csv, world_size {world_size}, mode {points.mode}."
    )
    return _plot(name, figures, title, caption, folder)


def _curve_in_words(points: Points, label: str, world_size: int) -> str:
    means = {b: points.mean(label, world_size, b, points.mode) for b in points.batches(world_size, label)}
    return ", ".join(f"{words.percent(mean.mean)} at {batch}" for batch, mean in means.items() if mean is not None)


def _training_plots(points: Points, folder: Path) -> list[Plot]:
    """Draw one small figure per world size and batch, all with one loss axis."""
    keys = [(world_size, batch) for world_size in points.world_sizes for batch in points.batches(world_size)]
    found = {key: training_lines(points, *key) for key in keys}
    shared = [loss for lines in found.values() for line in lines for loss in line.y]
    drawn = []
    for (world_size, batch), lines in found.items():
        if not lines:
            continue
        title = f"{words.count(batch, 'image')} per rank, {words.count(world_size, 'rank')}"
        figures = [plots.training_curve(lines, title, shared, theme) for theme in (plots.LIGHT, plots.DARK)]
        labels = ", ".join(line.name for line in lines)
        name = f"loss_{world_size}_ranks_{batch}_per_rank"
        drawn.append(_plot(name, figures, f"Training loss against step, {title}: {labels}", title, folder))
    return drawn


def _plot(name: str, figures: Sequence[Figure], title: str, caption: str, folder: Path) -> Plot:
    light, dark = [to_svg(figure) for figure in figures]
    files.write(folder / "plots" / f"{name}.svg", light)
    files.write(folder / "plots" / f"{name}.png", to_png(figures[0]))
    inline = [
        Markup(to_inline_svg(svg, f"{name}-{theme}", title)) for svg, theme in ((light, "light"), (dark, "dark"))
    ]
    return Plot(name, caption, *inline)


def _costs(points: Points) -> list[tuple[str, int, int, dict[str, Interval | None]]]:
    """Average what the cells took, over seeds."""
    lines = []
    for world_size in points.world_sizes:
        for label in points.labels:
            for batch in points.batches(world_size, label):
                cells = points.cells(label, world_size, batch)
                names = ("seconds", "training_seconds", "images_per_second")
                lines.append((label, world_size, batch, {name: _mean(cells, name) for name in names}))
    return lines


def _mean(cells: Sequence[Row], name: str) -> Interval | None:
    values: list[Any] = [row[name] for row in cells if row.get(name) is not None]
    return mean_interval(values) if values else None


def _data_uri(text: str) -> str:
    return "data:text/csv;charset=utf-8;base64," + base64.b64encode(text.encode("utf-8", "backslashreplace")).decode()
