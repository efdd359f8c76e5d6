"""The figure: each contender's time over that of the reference, of a layer and of a training step."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from experiment.bench.contenders import CONTENDERS
from experiment.bench.timing import geometric_mean

Row = dict[str, Any]
MARKERS = {"contiguous": ("o", "#d55e00"), "channels_last": ("s", "#0072b2")}
INK, GRID, COLOR = "#1b1f24", "#dfe3e8", "#0072b2"


def draw(parts: Mapping[str, Sequence[Row]]) -> Figure | None:
    """Draw the parts that have times beside a reference, or nothing."""
    panels = [
        (_draw_layer, _with(parts.get("layer", ()), "plain")),
        (_draw_step, _with(parts.get("step", ()), "bare")),
    ]
    panels = [(panel, rows) for panel, rows in panels if rows]
    if not panels:
        return None
    figure = Figure(figsize=(8, 3.2 * len(panels)), layout="constrained")
    for number, (panel, rows) in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, number + 1)
        axes.axvline(1, color=INK, linewidth=1)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        names = list(dict.fromkeys(row["contender"] for row in rows))
        axes.set_yticks(range(len(names)), [_label(name) for name in names])
        axes.invert_yaxis()
        panel(axes, rows, names)
    return figure


def _with(rows: Sequence[Row], base: str) -> list[Row]:
    return [row for row in rows if base in row["ratios"] and row["contender"] != base]


def _label(name: str) -> str:
    compiled = name.endswith("_compiled")
    return CONTENDERS[name.removesuffix("_compiled")].label + (", torch.compile" if compiled else "")


def _draw_layer(axes: Axes, rows: Sequence[Row], names: Sequence[str]) -> None:
    for form, (marker, color) in MARKERS.items():
        mine = [row for row in rows if row["format"] == form]
        heights = [names.index(row["contender"]) + (0.12 if form == "channels_last" else -0.12) for row in mine]
        values = [row["ratios"]["plain"].median for row in mine]
        axes.plot(values, heights, marker, color=color, alpha=0.7, label=form)
    for height, name in enumerate(names):
        mean = geometric_mean([row["ratios"]["plain"].median for row in rows if row["contender"] == name])
        axes.plot([mean, mean], [height - 0.35, height + 0.35], color=INK, linewidth=2)
    axes.plot([], [], color=INK, linewidth=2, label="geometric mean")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_title("Layer: time over nn.BatchNorm, a point per shape", loc="left")
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.08), ncols=3, frameon=False)


def _draw_step(axes: Axes, rows: Sequence[Row], names: Sequence[str]) -> None:
    for height, row in enumerate(rows):
        low, median, high = row["ratios"]["bare"]
        axes.plot([low, high], [height, height], color=COLOR, linewidth=2)
        axes.plot([median], [height], "o", color=COLOR)
    axes.set_xlim(left=0)
    axes.set_title("Training step: time over bare all_reduces, quartiles", loc="left")
