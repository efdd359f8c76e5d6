"""The looks of all figures: colours for light and dark, markers, axes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

MARKERS = "osD^vPX<>p"
LOG_RATIO = 5  # of largest to smallest value, above which an axis is logarithmic
FONT_SIZE = 10  # points, in figures that are shown at their own size or larger


@dataclass(frozen=True)
class Theme:
    """Colours of a figure: told apart by the colour-blind, and 3:1 or more against the background."""

    background: str
    ink: str
    grid: str
    colors: tuple[str, ...]


LIGHT = Theme(
    "#ffffff", "#1b1f24", "#dfe3e8", ("#d55e00", "#0072b2", "#009e73", "#b5569b", "#a87b00", "#555555", "#2b8cc4")
)
DARK = Theme(
    "#14171a", "#e8eaed", "#363c43", ("#ff8a4c", "#56b4e9", "#2cc295", "#e59ac6", "#f0e442", "#c8c8c8", "#b8a6ff")
)


def make_figure(width: float, height: float, theme: Theme) -> tuple[Figure, Axes]:
    """Make a figure of one plot, sizes in inches."""
    figure = Figure(figsize=(width, height), facecolor=theme.background, layout="constrained")
    axes = figure.add_subplot(facecolor=theme.background)
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.ink)
    axes.tick_params(colors=theme.ink, labelsize=FONT_SIZE)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set(color=theme.ink, fontsize=FONT_SIZE)
    return figure, axes


def set_limits(axes: Axes, values: Sequence[float], ends: Sequence[float], largest: float) -> None:
    """Give the y axis its scale: from zero, or logarithmic with plain tick labels if the values differ much."""
    values = [value for value in values if math.isfinite(value)]
    high = max([*values, *(end for end in ends if math.isfinite(end))], default=1.0)
    low = min(values, default=0.0)
    if low > 0 and max(values) > LOG_RATIO * low:
        bottom = min([low, *(end for end in ends if end > low / 2)])
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5) if high < 100 * bottom else (1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(bottom / 1.1, min(high, largest) * 1.15)
    else:
        axes.set_ylim(0, min(high * 1.08, largest) or 1.0)
    axes.yaxis.set_major_formatter(FuncFormatter(plain))


def plain(value: float, _: int | None = None) -> str:
    """Write a tick label without exponents."""
    return f"{value:g}"
