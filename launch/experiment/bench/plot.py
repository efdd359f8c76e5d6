"""The figure: times of a layer over plain BatchNorm's, times of a training step, and what `save_memory` saves."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from experiment.bench.contenders import CONTENDERS, base_for
from experiment.bench.timing import geometric_mean

Row = dict[str, Any]
MARKERS = {"contiguous": ("o", "#d55e00"), "channels_last": ("s", "#0072b2")}
SAVINGS = {"kept for backward": ("o", "#0072b2"), "peak": ("s", "#d55e00"), "time": ("^", "#009e73")}
TITLE: dict[str, Any] = {"loc": "left", "fontsize": "medium"}
INK, GRID, COLOR = "#1b1f24", "#dfe3e8", "#0072b2"


def draw(parts: Mapping[str, Sequence[Row]]) -> Figure | None:
    """Draw the parts of which there are rows, or nothing."""
    panels = [
        (_draw_layer, [row for row in parts.get("layer", ()) if _has_base(row, "plain")]),
        (_draw_step, parts.get("step", ())),
        (_draw_save_memory, parts.get("save_memory", ())),
    ]
    panels = [(panel, rows) for panel, rows in panels if rows]
    if not panels:
        return None
    figure = Figure(figsize=(8, 3.2 * len(panels)), layout="constrained")
    for number, (panel, rows) in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, number + 1)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        panel(axes, rows)
        axes.invert_yaxis()
    return figure


def _has_base(row: Row, base: str) -> bool:
    """Whether the row has a ratio to the base that it is compared with, and is not that base."""
    base = base_for(row["contender"], base)
    return row["contender"] != base and base in row["ratios"]


def _label_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [CONTENDERS[name].label for name in names])


def _draw_layer(axes: Axes, rows: Sequence[Row]) -> None:
    names = list(dict.fromkeys(row["contender"] for row in rows))
    _label_rows(axes, names)
    for form, (marker, color) in MARKERS.items():
        mine = [row for row in rows if row["format"] == form]
        heights = [names.index(row["contender"]) + (0.12 if form == "channels_last" else -0.12) for row in mine]
        values = [row["ratios"][base_for(row["contender"], "plain")].median for row in mine]
        axes.plot(values, heights, marker, color=color, alpha=0.7, label=form)
    for height, name in enumerate(names):
        base = base_for(name, "plain")
        mean = geometric_mean([row["ratios"][base].median for row in rows if row["contender"] == name])
        axes.plot([mean, mean], [height - 0.35, height + 0.35], color=INK, linewidth=2)
    axes.plot([], [], color=INK, linewidth=2, label="geometric mean")
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_title("Layer: time over nn.BatchNorm, compiled over compiled", **TITLE)
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.08), ncols=3, frameon=False)


def _draw_step(axes: Axes, rows: Sequence[Row]) -> None:
    _label_rows(axes, [row["contender"] for row in rows])
    for height, row in enumerate(rows):
        low, median, high = row["ms"]
        axes.plot([low, high], [height, height], color=COLOR, linewidth=2)
        axes.plot([median], [height], "o", color=COLOR)
    axes.set_xlim(left=0)
    axes.set_title("Training step: milliseconds, median and quartiles", **TITLE)


def _draw_save_memory(axes: Axes, rows: Sequence[Row]) -> None:
    models = list(dict.fromkeys(row["model"] for row in rows))
    axes.set_yticks(range(len(models)), models)
    for number, (label, (marker, color)) in enumerate(SAVINGS.items()):
        values = [_savings([row for row in rows if row["model"] == model])[number] for model in models]
        axes.plot(values, range(len(models)), marker, color=color, label=label)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xlim(left=0)
    axes.set_title("save_memory: with it over without it", **TITLE)
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.12), ncols=3, frameon=False)


def _savings(pair: Sequence[Row]) -> tuple[float, float, float]:
    plain, saving = pair
    return saving["saved"] / plain["saved"], saving["peak"] / plain["peak"], saving["ratios"]["plain"].median
