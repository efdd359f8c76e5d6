"""The results as CSV: one line per cell, and a summary of each point over its seeds."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from experiment.comparison.results_table import ResultsTable, Row

POINT = ("arm", "label", "per_rank_batch_size", "world_size", "group_size", "seed")
FIRST = ("cell", "status", "reason", "candidate", *POINT)
SUMMARY = (
    "label",
    "world_size",
    "per_rank_batch_size",
    "mode",
    "n",
    "test_error",
    "test_error_lower",
    "test_error_upper",
    "train_error",
    "train_loss",
)


def results_csv(rows: Sequence[Row]) -> str:
    """Lay out one line per cell: nested names joined by dots, lists by spaces, errors as fractions."""
    flat = [dict(_flatten(row)) for row in rows]
    others = sorted({name for row in flat for name in row} - set(FIRST))
    return _csv([*FIRST, *others], flat)


def _flatten(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in content.items():
        if isinstance(value, Mapping):
            found += _flatten(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, " ".join(map(str, value)) if isinstance(value, list) else value))
    return found


def summary_csv(results: ResultsTable) -> str:
    """Lay out one line per arm, ranks, batch and mode: the mean over seeds, its 95 % interval, n; as fractions."""
    lines = []
    for world_size in results.world_sizes:
        for label in results.labels:
            for batch in results.batches(world_size, label):
                lines += [_summary(results, label, world_size, batch, mode) for mode in results.modes]
    return _csv(SUMMARY, [line for line in lines if line])


def _summary(results: ResultsTable, label: str, world_size: int, batch: int, mode: str) -> dict[str, Any]:
    test = results.mean(label, world_size, batch, mode)
    train, loss = (results.mean(label, world_size, batch, mode, name) for name in ("train_error", "train_loss"))
    if test is None:
        return {}
    own = (label, world_size, batch, mode, test.n, test.mean, test.lower, test.upper)
    values = (*own, train and train.mean, loss and loss.mean)
    return dict(zip(SUMMARY, values, strict=True))


def _csv(names: Sequence[str], lines: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
