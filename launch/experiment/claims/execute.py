"""Execute runs, in this process or in several, each with one thread, so that any of them gives the same bits alone."""

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

from experiment.claims.registry import BY_NAME
from experiment.claims.runs import Numbers, Run
from experiment.training import report

PACKAGES = ("python", "syncbn", "torch", "scikit-learn", "numpy")  # whose versions can change a result
DEVICE = "cpu"


def made_with() -> dict[str, str]:
    """List the versions that a row depends on, and the device."""
    return {**{name: v for name, v in report.versions().items() if name in PACKAGES}, "device": DEVICE}


def execute(run: Run) -> dict[str, Any]:
    """Measure one run and give its row; a run that fails gives one with the reason."""
    torch.set_num_threads(1)
    versions = made_with()
    row = {
        "cell": run.id,
        "claim": run.claim,
        "phase": run.phase,
        "setting": run.setting,
        "rate": run.rate,
        "seed": run.seed,
        "versions": versions,
        "device": versions.pop("device"),
    }
    start = time.monotonic()
    outcome: dict[str, Any]
    try:
        numbers: Numbers = BY_NAME[run.claim].measure(run)
        outcome = {"status": "done", "numbers": numbers}
    except Exception as error:
        outcome = {"status": "failed", "reason": f"{type(error).__name__}: {report.first_line(error)}", "numbers": {}}
    return {**row, **outcome, "seconds": round(time.monotonic() - start, 2)}


def execute_all(runs: Sequence[Run], jobs: int) -> Iterator[dict[str, Any]]:
    """Yield the row of every run as it ends.

    Raises:
        BrokenProcessPool: a process was killed; the rows so far have been given.
    """
    if jobs == 1:
        yield from map(execute, runs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        try:
            for future in as_completed([pool.submit(execute, run) for run in runs]):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
