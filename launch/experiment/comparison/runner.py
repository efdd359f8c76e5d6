"""Run the cells, each in a process (or torchrun) of its own, as many at once as the cores allow."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from experiment.comparison.cell import Cell
from experiment.comparison.overrides import quoted
from experiment.comparison.worker import VARIABLE

TRAIN = Path(__file__).parents[3] / "launch" / "train.py"
CURVE_POINTS = 50  # of a training curve: means over equal parts of the training
ERROR = re.compile(r"^((?:[\w.]+\.)?\w+(?:Error|Exception|Interrupt)\b.*(?:\n[ \t]+\S.*)*)$", re.MULTILINE)
AROUND = re.compile(r"\x1b\[[\d;]*m|^\[rank\d+\]: ?", re.MULTILINE)  # colors, and torch's prefix that names the rank
CHAINED = ("direct cause of the following exception", "another exception occurred")


@dataclass(frozen=True)
class Share:
    """Hold how the machine is shared out: cells at once, and threads of each process."""

    jobs: int
    num_threads: int
    num_gpus: int = 0

    @classmethod
    def of_machine(cls, num_processes: int, jobs: int | None = None, device: str = "cpu") -> "Share":
        """Use every core (or GPU) once.

        Args:
            num_processes: Of one cell.
            jobs: Cells at once; None for as many as there is room for.
            device: That the cells run on: cpu or cuda.
        """
        if jobs is not None and (isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1):
            raise ValueError(f"expected jobs to be a number of cells, at least 1, got {jobs!r}")
        here = hasattr(os, "sched_getaffinity")  # not on macOS
        cores = len(os.sched_getaffinity(0)) if here else os.cpu_count() or 1
        gpus = torch.cuda.device_count() if device == "cuda" else 0
        jobs = jobs or max(1, (gpus or cores) // num_processes)
        return cls(jobs, max(1, cores // (jobs * num_processes)), gpus)


@dataclass
class Running:
    """Hold a cell that has been started."""

    cell: Cell
    process: subprocess.Popen[bytes]
    folder: Path
    slot: int
    start: datetime = field(default_factory=datetime.now)
    clock: float = field(default_factory=time.monotonic)

    @property
    def progress(self) -> float:
        """Tell the fraction of the training that is done."""
        with suppress(OSError, ValueError):
            return float((self.folder / "progress").read_text())
        return 0.0

    @property
    def seconds(self) -> float:
        """Tell the time since the start."""
        return time.monotonic() - self.clock


def command(cell: Cell, engine: str, num_processes: int) -> list[str]:
    """Give the command line of a cell, from the repository."""
    torchrun = ["torchrun", "--standalone", "--nproc-per-node", str(num_processes)]
    return [*(torchrun if engine == "torchrun" else ["python"]), "launch/train.py", *cell.overrides]


def run_cells(
    cells: list[Cell], engine: str, folder: Path, share: Share, finished: Callable[[dict[str, Any]], None]
) -> Generator[list[Running]]:
    """Run `cells`, call `finished` with each one's row, and yield what is running, a few times a second.

    A cell that fails gives a row with its reason, and the others go on. Closing the generator ends what still runs.
    """
    waiting, slots = list(reversed(cells)), set(range(share.jobs))
    running: list[Running] = []
    try:
        while waiting or running:
            while waiting and slots:
                running.append(_start(waiting.pop(), engine, folder, share, slots.pop()))
            yield running
            time.sleep(0.2)
            for done in [r for r in running if r.process.poll() is not None]:
                running.remove(done)
                slots.add(done.slot)
                finished(_row(done, engine))
    finally:
        _end([r.process for r in running])


def _start(cell: Cell, engine: str, root: Path, share: Share, slot: int) -> Running:
    folder = (root / "cells" / cell.id).absolute()
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier try
    folder.mkdir(parents=True, exist_ok=True)
    num_processes = cell.world_size if engine == "torchrun" else 1
    environment = {**os.environ, "OMP_NUM_THREADS": str(share.num_threads), VARIABLE: str(folder / "progress")}
    if share.num_gpus:
        gpus = range(slot * num_processes, (slot + 1) * num_processes)
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu % share.num_gpus) for gpu in gpus)
    _, *arguments = command(cell, engine, num_processes)
    module = ["-m", "torch.distributed.run"] if engine == "torchrun" else []
    arguments[arguments.index("launch/train.py")] = str(TRAIN)
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *module, *arguments, f"output_dir={quoted(str(folder))}"],
            env=environment,
            stdin=subprocess.PIPE,  # ends when this process does, and the cell with it
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    return Running(cell, process, folder, slot)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()  # reaches the ranks, too
        process.terminate()
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()


def _row(done: Running, engine: str) -> dict[str, Any]:
    """Give the line of a cell that has ended."""
    num_processes = done.cell.world_size if engine == "torchrun" else 1
    row = {
        **done.cell.coordinates(),
        "engine": engine,
        "start": done.start.isoformat(timespec="seconds"),
        "seconds": round(done.seconds, 1),
        "command": shlex.join(command(done.cell, engine, num_processes)),
    }
    assert done.process.stdin is not None
    done.process.stdin.close()
    found = list(done.folder.glob("*/results.json"))
    if done.process.returncode or not found:
        return {**row, "status": "failed", "reason": _reason(done)}
    results = json.loads(found[0].read_text())
    shutil.rmtree(found[0].parent / "checkpoints", ignore_errors=True)
    ours = {"arm", "seed", "start", "command", "per_rank_batch_size", "world_size", "accumulate", "simulate"}
    curve = _curve(found[0].parent / "csv" / "metrics.csv")
    return {**row, "status": "done", **{k: v for k, v in results.items() if k not in ours}, "curve": curve}


def _reason(done: Running) -> str:
    """Find the first error in the log of a failed cell; of errors that caused each other, the last."""
    path = done.folder / "log.txt"
    log = AROUND.sub("", path.read_text(errors="replace"))
    errors = [error for error in ERROR.finditer(log) if "ChildFailedError" not in error[1]]
    if not errors:
        code = done.process.returncode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code} and no results"
        lines = [line for line in log.splitlines() if line.strip() and "HYDRA_FULL_ERROR" not in line]
        return f"{how}{f'; last words: {lines[-1][:300]}' if lines else ''} (log: {path})"
    found = errors[0]
    for error in errors[1:]:
        if not any(text in log[found.end() : error.start()] for text in CHAINED):
            break
        found = error
    return f"{' '.join(found[1].split())[:500]} (log: {path})"


def _curve(path: Path) -> dict[str, list[float]]:
    """Read the training loss, as means over equal parts of the training."""
    if not path.is_file():
        return {"step": [], "loss": []}
    with path.open(newline="") as file:
        rows = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file) if row.get("loss")]
    size = -(-len(rows) // CURVE_POINTS) or 1
    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    means = [[sum(values) / len(part) for values in zip(*part, strict=True)] for part in parts]
    return {"step": [round(step) for step, _ in means], "loss": [round(loss, 5) for _, loss in means]}
