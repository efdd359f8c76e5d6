"""The tables of a scaling measurement: fitted parameters, points beside their predictions, predictions for GPUs."""

from collections.abc import Sequence
from typing import Any

from experiment.bench.scaling.cost_model import DEVICES_PER_NODE
from experiment.bench.scaling.measure import COLLECTIVES, SYNCHRONIZED
from experiment.bench.tables import Table, spread

Row = dict[str, Any]
LIMIT = 25  # % that a judged prediction may be off
_KEY = ["network", "delay, ms", "ranks", "what"]
_PREDICTED = ["predicted, ms", "error, %", ""]


def tabulate(rows: Sequence[Row]) -> list[Table]:
    """Lay out whatever is there."""
    points = [row for row in rows if row["kind"] == "point"]
    points.sort(key=lambda row: (row["network"], row["delay_ms"], row["world_size"]))
    missing = [row["reason"] for row in rows if row["kind"] == "missing"]
    fits, gpus = ([row for row in rows if row["kind"] == kind] for kind in ("fit", "gpus"))
    tables = (_layers(points, missing), _bare(points), _fits(fits), _gpus(gpus))
    return [table for table in tables if table.rows or (missing and table is tables[0])]


def _layers(points: Sequence[Row], missing: Sequence[str]) -> Table:
    plain = {_key(row): row["ms"] for row in points if row["what"].startswith("bn ")}  # measured without delay
    lines = []
    for row in points:
        if row["what"] in SYNCHRONIZED:
            network, _, ranks, what = _key(row)
            bn = plain.get((network, "0", ranks, f"bn {what}"))
            lines.append([*_key(row), "" if bn is None else f"{bn.median:.2f}", spread(row["ms"]), *_predicted(row)])
    judged = [abs(row["error_percent"]) for row in points if row.get("role") == "judged"]
    note = "Median (quartiles) over rounds of the slowest rank. The model has seen the fitted points and no others."
    if judged:
        within = sum(error <= LIMIT for error in judged)
        note += f" Judged: {within} of {len(judged)} within {LIMIT} %, the worst {max(judged):.0f} % off."
    note = " ".join([note, *(f"Hosts with delay: {reason}." for reason in missing)])
    columns = [*_KEY, "nn.BatchNorm, ms", "SyncBatchNorm, ms", *_PREDICTED]
    return Table("Layer and step: measured and predicted", columns, lines, note)


def _bare(points: Sequence[Row]) -> Table:
    lines = [[*_key(row), spread(row["ms"]), *_predicted(row)] for row in points if row["what"] in COLLECTIVES]
    note = "One collective of 2C + 1 float64 numbers, as the forward pass makes it."
    return Table("Bare collectives: measured and predicted", [*_KEY, "measured, ms", *_PREDICTED], lines, note)


def _key(row: Row) -> tuple[str, str, str, str]:
    what = row["what"] if row["num_features"] is None else f"{row['what']}, C = {row['num_features']}"
    return row["network"], f"{row['delay_ms']:g}", str(row["world_size"]), what


def _predicted(row: Row) -> list[str]:
    if "role" not in row:
        return ["", "", ""]
    return [f"{row['predicted_ms']:.2f}", f"{row['error_percent']:+.0f}", row["role"]]


def _fits(fits: Sequence[Row]) -> Table:
    lines = [
        [fit["network"], f"{1e6 * fit['overhead']:.0f}", f"{1e6 * fit['latency']:.0f}", _rate(fit["per_byte"])]
        + [f"{work['ms']:.2f}" for work in fit["work"]]
        for fit in fits
    ]
    works = (
        [w["what"] + ("" if w["num_features"] is None else f" C = {w['num_features']}") for w in fits[0]["work"]]
        if fits
        else []
    )
    columns = ["network", "overhead, µs", "latency, µs", "bandwidth, MB/s", *(f"work of {work}, ms" for work in works)]
    return Table("What was fitted", columns, lines, "To the points without added delay of 2 and 4 ranks.")


def _rate(per_byte: float) -> str:
    return f"{1e-6 / per_byte:.0f}" if per_byte else "no limit seen"


def _gpus(rows: Sequence[Row]) -> Table:
    lines = [
        [
            f"{row['num_devices']:,}",
            f"{2 * row['num_devices']:,}",
            f"{-(-row['num_devices'] // DEVICES_PER_NODE):,}",
            row["algorithm"],
            f"{row['layer_64_us']:.0f}",
            f"{row['layer_2048_us']:.0f}",
            f"{row['resnet50_ms']:.1f}",
        ]
        for row in rows
    ]
    columns = [
        "devices in the group",
        "images at 2 each",
        "nodes",
        "algorithm",
        "layer C = 64, µs",
        "layer C = 2048, µs",
        "ResNet-50 step, ms",
    ]
    note = "Exchanges alone, forward and backward. A model with NCCL's own constants: nothing was measured on a GPU."
    return Table("Predicted for GPUs", columns, lines, note)
