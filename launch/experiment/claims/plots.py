"""Draw the figures of the claims: a number against a setting, or one point per arm; bands and bars are intervals."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from experiment.claims.claim import Plot
from experiment.claims.names import ARMS, describe
from experiment.claims.runs import Row
from experiment.comparison.statistics import Interval, mean_interval
from experiment.pages.figures import FONT_SIZE, MARKERS, Theme, make_figure, plain, set_limits

Points = list[tuple[float, Interval]]
WIDTH = 4.6  # inches, as the figures of the comparison


def lines_of(plot: Plot, rows: Sequence[Row]) -> dict[str, Points]:
    """Average over seeds: the points of each line by its name, in the order of the rows' settings."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        value = row["numbers"].get(plot.y)
        keys = {*plot.lines, *([plot.x] if plot.x else [])}
        if value is None or not (keys <= set(row["setting"]) and plot.where.items() <= row["setting"].items()):
            continue
        name = describe({key: row["setting"][key] for key in plot.lines})
        x = float(row["setting"][plot.x]) if plot.x else 0.0
        found.setdefault(name, {}).setdefault(x, []).append(100 * value if plot.percent else value)
    return {name: [(x, mean_interval(found[name][x])) for x in sorted(found[name])] for name in _ordered(found)}


def _ordered(names: dict[str, dict[float, list[float]]]) -> list[str]:
    """Put arms into their own order, behind what else tells lines apart."""
    order = list(ARMS.values())
    return sorted(names, key=lambda name: [_rank(part, order) for part in name.split(", ")])


def _rank(part: str, order: list[str]) -> tuple[int, str]:
    return (order.index(part), "") if part in order else (-1, part)


def draw(plot: Plot, rows: Sequence[Row], theme: Theme) -> Figure:
    """Draw one figure."""
    lines = lines_of(plot, rows)
    height = 3.3 + 0.12 * len(lines) if plot.x else 1.2 + 0.34 * len(lines)
    figure, axes = make_figure(WIDTH, height, theme)
    axes.set_title(plot.title, loc="left", fontsize=FONT_SIZE, color=theme.ink)
    if plot.x:
        _draw_lines(axes, plot, lines, theme)
        if len(lines) > 1:
            figure.legend(loc="outside lower center", ncols=2, fontsize=FONT_SIZE, frameon=False, labelcolor=theme.ink)
    else:
        _draw_points(axes, plot, lines, theme)
    return figure


def _look(index: int, name: str, theme: Theme) -> tuple[str, str]:
    """Give colour and marker of a line: an arm has the same in all figures."""
    arms = [i for i, arm in enumerate(ARMS.values()) if arm in name.split(", ")]
    index = arms[0] if arms else index
    return theme.colors[index % len(theme.colors)], MARKERS[index % len(MARKERS)]


def _draw_lines(axes: Axes, plot: Plot, lines: dict[str, Points], theme: Theme) -> None:
    for index, (name, points) in enumerate(lines.items()):
        xs, means = [x for x, _ in points], [interval.mean for _, interval in points]
        halves = [interval.half or 0.0 for _, interval in points]
        color, marker = _look(index, name, theme)
        low, high = ([m + sign * h for m, h in zip(means, halves, strict=True)] for sign in (-1, 1))
        if plot.percent:
            low, high = [max(value, 0.0) for value in low], [min(value, 100.0) for value in high]
        axes.fill_between(xs, low, high, color=color, alpha=0.14, linewidth=0)
        axes.plot(xs, means, color=color, marker=marker, label=name, linewidth=1.6)
    intervals = [interval for points in lines.values() for _, interval in points]
    values = [interval.mean for interval in intervals]
    if min(values, default=0.0) >= 0:
        ends = [end for i in intervals for end in (i.lower, i.upper) if end is not None]
        set_limits(axes, values, ends, 100 if plot.percent else float("inf"))
    if plot.log_x and lines:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(sorted({x for points in lines.values() for x, _ in points})))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(plain))
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)


def _draw_points(axes: Axes, plot: Plot, lines: dict[str, Points], theme: Theme) -> None:
    for index, (name, [(_, interval)]) in enumerate(lines.items()):
        color, marker = _look(index, name, theme)
        axes.errorbar([interval.mean], [name], xerr=[interval.half or 0.0], fmt=marker, color=color, capsize=4)
    axes.invert_yaxis()
    axes.margins(y=0.15)
    if plot.log_y and all(interval.mean > 0 for [(_, interval)] in lines.values()):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(plain))
    axes.set_xlabel(plot.y_label)
