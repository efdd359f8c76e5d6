"""Draw the figures: test error against the per-rank batch size, and training curves."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from experiment.comparison.curves import Line, error_lines
from experiment.comparison.formatting import count
from experiment.comparison.results_table import ResultsTable
from experiment.pages.figure_files import ignore_missing_glyphs
from experiment.pages.figures import FONT_SIZE, MARKERS, Theme, make_figure, plain, set_limits

LINE_LENGTH = 14  # characters of a label beside a curve


def error_curve(results: ResultsTable, world_size: int, theme: Theme) -> Figure:
    """Draw test error in % against the per-rank batch size, a line with a 95 % band for each arm."""
    lines = error_lines(results, world_size)
    figure, axes = make_figure(4.6, max(3.6, 1.2 + 0.3 * len(lines)), theme)
    batches = results.batches(world_size)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(batches))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(plain))
    axes.set_xlim(batches[0] / 2**0.25, batches[-1] * 2**0.25)
    axes.set_xlabel("images per rank")
    score = results.done[0].get("score", "accuracy")
    axes.set_ylabel(
        "test error, %" if score == "accuracy" else f"test error (1 \N{MINUS SIGN} {score}), %", parse_math=False
    )
    axes.set_title(_title(results, world_size), loc="left", fontsize=FONT_SIZE, color=theme.ink)
    set_limits(
        axes, [v for line in lines for v in line.y], [v for line in lines for v in line.lower + line.upper], 100
    )
    for line in lines:
        _draw(axes, line, theme, marker=True, alpha=min(0.16, 0.6 / len(lines)))
    _label_lines(figure, axes, lines, theme, marker=True)
    return figure


def _title(results: ResultsTable, world_size: int) -> str:
    keys = [(label, world_size, batch) for label in results.labels for batch in results.batches(world_size, label)]
    ns = sorted({len(results.values(*key, results.mode)) for key in keys} - {0}) or [0]
    seeds = count(ns[0], "seed") if len(ns) == 1 else f"{ns[0]} to {ns[-1]} seeds"
    return f"{count(world_size, 'rank')}, {seeds}" + (", band: 95 % interval" if ns[-1] > 1 else ", no interval")


def training_curve(lines: list[Line], title: str, shared: Sequence[float], theme: Theme) -> Figure:
    """Draw training loss against step; `shared` are the losses of all figures that share this one's axis."""
    figure, axes = make_figure(3.7, max(2.9, 1.0 + 0.3 * len(lines)), theme)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.set_title(title, loc="left", fontsize=FONT_SIZE, color=theme.ink)
    axes.locator_params(axis="x", nbins=4)
    set_limits(axes, shared, [], math.inf)
    for line in lines:
        _draw(axes, line, theme, marker=False)
    _label_lines(figure, axes, lines, theme, marker=False)
    return figure


def _style(line: Line, theme: Theme, marker: bool) -> dict[str, Any]:
    color = theme.colors[line.index % len(theme.colors)]
    shape = MARKERS[line.index % len(MARKERS)] if marker else "none"
    dashes = ["-", "--", ":"][line.index // len(theme.colors) % 3]
    return {"color": color, "marker": shape, "markersize": 6, "markeredgecolor": theme.background, "linestyle": dashes}


def _draw(axes: Axes, line: Line, theme: Theme, marker: bool, alpha: float = 0.0) -> None:
    style = _style(line, theme, marker)
    if len(line.x) == 1 and math.isfinite(line.lower[0]):  # a band of one point has no width
        reach = [[line.y[0] - line.lower[0]], [line.upper[0] - line.y[0]]]
        axes.errorbar(line.x, line.y, yerr=reach, fmt="none", ecolor=style["color"], elinewidth=1.2, capsize=4)
    else:
        axes.fill_between(line.x, line.lower, line.upper, color=style["color"], alpha=alpha, linewidth=0)
    axes.plot(line.x, line.y, linewidth=1.8 if marker else 1.3, zorder=3, **style)


def _label_lines(figure: Figure, axes: Axes, lines: list[Line], theme: Theme, marker: bool) -> None:
    """Name the lines to the right of the axes, at the height of their ends where there is room."""
    ends = [
        (line, next((x, y) for x, y in zip(line.x[::-1], line.y[::-1], strict=True) if math.isfinite(y)))
        for line in lines
    ]
    texts = [
        axes.text(1.15, 0.5, _wrapped(line.name), transform=axes.transAxes, va="center", color=theme.ink,
                  fontsize=FONT_SIZE, linespacing=1.0, parse_math=False)
        for line in lines
    ]  # fmt: skip
    with ignore_missing_glyphs():
        figure.draw_without_rendering()  # the layout makes room for the texts
    box = axes.get_window_extent()
    heights = [text.get_window_extent().height + 4 for text in texts]
    wanted = [float(axes.transData.transform(end)[1]) for _, end in ends]
    for (line, end), text, position in zip(ends, texts, spread(wanted, heights, box.y0, box.y1), strict=True):
        y = (position - box.y0) / box.height
        text.set_y(y)
        x, end_y = axes.transAxes.inverted().transform(axes.transData.transform(end))
        style = _style(line, theme, marker)
        beside = {"transform": axes.transAxes, "clip_on": False, "color": style["color"]}
        axes.plot([x, 1.02, 1.04], [end_y, y, y], linewidth=0.7, alpha=0.8, **beside)
        axes.plot([1.04, 1.12], [y, y], linewidth=1.8, linestyle=style["linestyle"], **beside)
        axes.plot([1.08], [y], marker=style["marker"], markersize=6, markeredgecolor=theme.background, **beside)


def spread(wanted: Sequence[float], heights: Sequence[float], low: float, high: float) -> list[float]:
    """Move positions apart until things of these heights do not overlap, no farther from the wanted ones than needed.

    Things that would overlap stand in one stack, centred on what its things want, between low and high.
    """
    stacks: list[tuple[float, list[int]]] = []  # lower end, things from below
    for thing in sorted(range(len(wanted)), key=lambda i: wanted[i]):
        things = [thing]
        start = _start(things, wanted, heights, low, high)
        while stacks and stacks[-1][0] + sum(heights[i] for i in stacks[-1][1]) > start:
            things = stacks.pop()[1] + things
            start = _start(things, wanted, heights, low, high)
        stacks.append((start, things))
    positions = list(wanted)
    for start, things in stacks:
        for i in things:
            positions[i] = start + heights[i] / 2
            start += heights[i]
    return positions


def _start(things: list[int], wanted: Sequence[float], heights: Sequence[float], low: float, high: float) -> float:
    tops = np.cumsum([heights[i] for i in things])
    starts = [wanted[i] - (top - heights[i] / 2) for i, top in zip(things, tops, strict=True)]
    return max(low, min(float(np.mean(starts)), high - float(tops[-1])))


def _wrapped(name: str) -> str:
    printable = "".join(char if char.isprintable() else "?" for char in name)
    words = textwrap.wrap(printable.replace("_", "_ "), LINE_LENGTH)  # a line may end behind a _
    lines = [line.replace("_ ", "_") for line in words] or ["?"]
    return "\n".join(lines[:2]) + ("…" if len(lines) > 2 else "")
