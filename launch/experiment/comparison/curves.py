"""The curves of the figures: one line per arm, of test error or training loss."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiment.comparison.results_table import ResultsTable, is_number
from experiment.comparison.statistics import Interval


@dataclass
class Line:
    """One arm's line: x, y, and where there is an interval its ends, else NaN."""

    name: str
    index: int  # among the report's arms, for colour and marker
    x: list[float]
    y: list[float]
    lower: list[float]
    upper: list[float]


def error_lines(results: ResultsTable, world_size: int) -> list[Line]:
    """Give test error in % over the per-rank batch sizes, a line for each arm that has any."""
    lines = [_error_line(results, label, world_size) for label in results.labels]
    return [line for line in lines if line.x]


def _error_line(results: ResultsTable, label: str, world_size: int) -> Line:
    found = {b: results.mean(label, world_size, b, results.mode) for b in results.batches(world_size, label)}
    means: dict[int, Interval] = {batch: mean for batch, mean in found.items() if mean is not None}
    ends = [(math.nan, math.nan) if p.half is None else (p.mean - p.half, p.mean + p.half) for p in means.values()]
    return Line(
        label,
        results.indices[label],
        [float(batch) for batch in means],
        [100 * point.mean for point in means.values()],
        [100 * max(lower, 0.0) for lower, _ in ends],
        [100 * min(upper, 1.0) for _, upper in ends],
    )


def training_lines(results: ResultsTable, world_size: int, batch: int) -> list[Line]:
    """Average the training losses over seeds, at the steps all of them have."""
    lines = []
    for label in results.labels:
        seeds = [_curve(row.get("curve") or {}) for row in results.cells(label, world_size, batch)]
        seeds = [seed for seed in seeds if seed]
        steps = sorted(set.intersection(*(set(seed) for seed in seeds))) if seeds else []
        losses = [float(np.mean([seed[step] for seed in seeds])) for step in steps]
        nothing = [math.nan] * len(steps)
        if any(math.isfinite(loss) for loss in losses):
            lines.append(Line(label, results.indices[label], steps, losses, nothing, nothing))
    return lines


def _curve(curve: dict[str, Any]) -> dict[float, float]:
    losses = [loss if is_number(loss) else math.nan for loss in curve.get("loss", [])]
    return dict(zip(curve.get("step", []), losses, strict=False))
