"""The figure: times over those of plain BatchNorm, of a layer and of a training step, and what `save_memory` saves."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from experiment.bench.contenders import CONTENDERS, run_alike
from experiment.bench.timing import geometric_mean

Row = dict[str, Any]
MARKERS = {"contiguous": ("o", "#d55e00"), "channels_last": ("s", "#0072b2")}
SAVINGS = {"kept for backward": ("o", "#0072b2"), "peak": ("s", "#d55e00"), "time": ("^", "#009e73")}
TITLE: dict[str, Any] = {"loc": "left", "fontsize": "medium"}
INK, GRID, COLOR = "#1b1f24", "#dfe3e8", "#0072b2"


def draw(parts: Mapping[str, Sequence[Row]]) -> Figure | None:
    """Draw the parts that have times beside a reference, or nothing."""
    panels = [
        (_draw_layer, _with(parts.get("layer", ()), "plain")),
        (_draw_step, _with(parts.get("step", ()), "bare")),
        (_draw_save_memory, parts.get("save_memory", ())),
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
        panel(axes, rows)
        axes.invert_yaxis()
    return figure


def _with(rows: Sequence[Row], base: str) -> list[Row]:
    """Return the rows that have a ratio to the base that ran alike, and are not that base."""
    bases = {name: run_alike(base, name) for name in {row["contender"] for row in rows}}
    return [row for row in rows if row["contender"] != bases[row["contender"]] in row["ratios"]]


def _name(axes: Axes, rows: Sequence[Row]) -> list[str]:
    names = list(dict.fromkeys(row["contender"] for row in rows))
    axes.set_yticks(range(len(names)), [CONTENDERS[name].label for name in names])
    return names


def _draw_layer(axes: Axes, rows: Sequence[Row]) -> None:
    names = _name(axes, rows)
    for form, (marker, color) in MARKERS.items():
        mine = [row for row in rows if row["format"] == form]
        heights = [names.index(row["contender"]) + (0.12 if form == "channels_last" else -0.12) for row in mine]
        values = [row["ratios"][run_alike("plain", row["contender"])].median for row in mine]
        axes.plot(values, heights, marker, color=color, alpha=0.7, label=form)
    for height, name in enumerate(names):
        base = run_alike("plain", name)
        mean = geometric_mean([row["ratios"][base].median for row in rows if row["contender"] == name])
        axes.plot([mean, mean], [height - 0.35, height + 0.35], color=INK, linewidth=2)
    axes.plot([], [], color=INK, linewidth=2, label="geometric mean")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_title("Layer: time over nn.BatchNorm (compiled over compiled), per shape", **TITLE)
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.08), ncols=3, frameon=False)


def _draw_step(axes: Axes, rows: Sequence[Row]) -> None:
    _name(axes, rows)
    for height, row in enumerate(rows):
        low, median, high = row["ratios"][run_alike("bare", row["contender"])]
        axes.plot([low, high], [height, height], color=COLOR, linewidth=2)
        axes.plot([median], [height], "o", color=COLOR)
    axes.set_xlim(left=0)
    axes.set_title("Training step: time over bare all_reduces (compiled over compiled)", **TITLE)


def _draw_save_memory(axes: Axes, rows: Sequence[Row]) -> None:
    models = list(dict.fromkeys(row["model"] for row in rows))
    axes.set_yticks(range(len(models)), models)
    for number, (label, (marker, color)) in enumerate(SAVINGS.items()):
        values = [_savings([row for row in rows if row["model"] == model])[number] for model in models]
        axes.plot(values, range(len(models)), marker, color=color, label=label)
    axes.set_xlim(left=0)
    axes.set_title("save_memory: with it over without it", **TITLE)
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.12), ncols=3, frameon=False)


def _savings(pair: Sequence[Row]) -> tuple[float, float, float]:
    plain, saving = pair
    return saving["saved"] / plain["saved"], saving["peak"] / plain["peak"], saving["ratios"]["plain"].median
