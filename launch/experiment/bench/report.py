"""The report of a benchmark: `bench.json`, `bench.md`, and the plot as `bench.svg` and `bench.png`."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from experiment.bench.plot import draw
from experiment.bench.registry import PARTS
from experiment.training.atomic_files import write_file


def machine(device: str, num_threads: int) -> dict[str, Any]:
    """Tell what times depend on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"cpu": _cpu(), "cores": cores, **gpu, "threads per process": num_threads, **versions}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_report(folder: Path, results: dict[str, Any]) -> None:
    """Write all files over those of a run before.

    Args:
        folder: Where to.
        results: `command`, `date`, `machine`, `config`, and `parts`: rows by the name of the part.
    """
    write_file(folder / "bench.json", json.dumps(results, indent=1) + "\n")
    write_file(folder / "bench.md", markdown(results))
    figure = draw(results["parts"])
    if figure is not None:
        for kind in ("svg", "png"):
            figure.savefig(folder / f"bench.{kind}", dpi=150)


def markdown(results: dict[str, Any]) -> str:
    """Lay out command, date, machine and the tables of all parts."""
    about = ", ".join(f"{name} {value}" if name != "cpu" else value for name, value in results["machine"].items())
    head = f"`{results['command']}`, {results['date']}; {about}.\n"
    tables = [table for name, rows in results["parts"].items() for table in PARTS[name].tabulate(rows)]
    return "\n".join([head, *(table.markdown() for table in tables)])
