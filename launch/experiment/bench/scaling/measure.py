"""Measure a layer and a step on 1 to 16 processes and between delayed hosts, beside the predictions of the cost model.

`cost_model` is fitted to what was measured without added delay, on each network by itself, and predicts all points.
"""

import os
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from experiment.bench import spawn, timing
from experiment.bench.scaling import cost_model
from experiment.bench.scaling.cost_model import Link, Point
from experiment.bench.scaling.network import Network, NotAvailableError
from experiment.bench.scaling.worker import Subject, num_calls, on_rank

Row = dict[str, Any]
FITTED_WORLD_SIZES = (2, 4)
COLLECTIVES = ("all_reduce", "all_gather")
SYNCHRONIZED = ("layer", "step")


def measure(config: DictConfig) -> list[Row]:
    """Time everything on every network, fit the model, and predict.

    Returns:
        Rows of `kind` "point" (`network`, `delay_ms`, `world_size`, `what`, `num_features`, `ms` as quartiles over
        rounds of the slowest rank, `exchanges`, and `predicted_ms`, `error_percent` and `role`: "fitted", "judged"
        or "shown"), "fit" (a link and the work on it), "gpus" (predictions only), and "missing" (`reason`).
    """
    part, rows = config.scale, []
    for world_size in part.world_sizes:
        rows += _measure(config, "loopback", world_size, ())
    return [*predict(rows, num_cores()), *_measure_hosts(config), *on_gpus(part.num_devices)]


def _measure_hosts(config: DictConfig) -> list[Row]:
    rows: list[Row] = []
    try:
        for num_hosts in config.scale.hosts:
            with Network(num_hosts, [delay / 1e3 for delay in config.scale.delays_ms]) as network:
                namespaces = [network.namespace(host) for host in range(num_hosts)]
                rows += _measure(config, "switch", num_hosts, namespaces)
    except NotAvailableError as error:
        return [{"kind": "missing", "network": "switch", "reason": f"not available: {error}"}]
    return predict(rows, num_cores())


def num_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _measure(config: DictConfig, network: str, world_size: int, namespaces: Sequence[str]) -> list[Row]:
    setting = spawn.Setting(config.timeout, "cpu", config.threads)
    answers = spawn.run(on_rank, world_size, setting, config, list(namespaces))
    times = timing.slowest([times for times, _ in answers])
    return [
        {
            "kind": "point",
            "network": network,
            "world_size": world_size,
            **subject._asdict(),
            "ms": timing.quartiles([1e3 * seconds / num_calls(subject) for seconds in times[str(number)]]),
            "exchanges": exchanges,
        }
        for number, (subject, exchanges) in enumerate(answers[0][1])
    ]


def predict(points: Sequence[Row], cores: int) -> list[Row]:
    """Fit the model to the points without added delay of 2 and 4 ranks, and predict every point of that network.

    The link is fitted to the bare collectives, then the work to the layers and steps.

    Returns:
        The points, with predictions where something was exchanged, and a row of `kind` "fit".
    """
    fitted = [p for p in points if p["exchanges"] and not p["delay_ms"] and p["world_size"] in FITTED_WORLD_SIZES]
    if not fitted:
        return [*points]
    link = cost_model.fit_link([_point(row) for row in fitted if row["what"] in COLLECTIVES])
    of_subject: dict[Subject, list[Point]] = {}
    for row in fitted:
        if row["what"] in SYNCHRONIZED:
            of_subject.setdefault(_subject(row), []).append(_point(row))
    works = {subject: cost_model.fit_work(found, cores, link) for subject, found in of_subject.items()}
    predicted = []
    for row in points:
        seconds = 0.0 if row["what"] in COLLECTIVES else works.get(_subject(row))
        if seconds is not None and row["exchanges"]:
            role = "fitted" if row in fitted else "shown"
            role = "judged" if row["delay_ms"] and row["what"] in SYNCHRONIZED else role
            row = {**row, **_prediction(row, seconds, cores, link), "role": role}
        predicted.append(row)
    work = [{"what": what, "num_features": num, "ms": 1e3 * seconds} for (what, num, _), seconds in works.items()]
    return [*predicted, {"kind": "fit", "network": points[0]["network"], **link._asdict(), "work": work}]


def _prediction(row: Row, work: float, cores: int, link: Link) -> Row:
    seconds = cost_model.seconds(work, row["exchanges"], row["world_size"], cores, link, row["delay_ms"] / 1e3)
    return {"predicted_ms": 1e3 * seconds, "error_percent": 100 * (1e3 * seconds / row["ms"].median - 1)}


def _subject(row: Row) -> Subject:
    return Subject(row["what"], row["num_features"])  # on any delay


def _point(row: Row) -> Point:
    return Point(row["exchanges"], row["world_size"], row["ms"].median / 1e3)


def on_gpus(num_devices: Sequence[int]) -> list[Row]:
    """Predict the exchanges of a layer and of a ResNet-50 step for groups of so many devices."""
    return [
        {
            "kind": "gpus",
            "num_devices": num,
            "algorithm": cost_model.nccl_all_reduce(8 * 129, num).algorithm,
            "layer_64_us": 1e6 * cost_model.layer_on_gpus(64, num),
            "layer_2048_us": 1e6 * cost_model.layer_on_gpus(2048, num),
            "resnet50_ms": 1e3 * cost_model.resnet50_on_gpus(num),
        }
        for num in num_devices
    ]
