"""The report of a check: a plain table, JSON and Markdown."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiment.training.atomic_files import write_file

from . import requirements
from .registry import PARTS
from .result import Record, to_json
from .runner import ROOT

_WIDTH = 100  # characters of a summary in the plain table
_DESCRIPTIONS = {part.name: part.description for part in PARTS}


def collect_facts(device: str, command: str, date: str) -> dict[str, str]:
    """Say what ran where; makes no context on the GPU, so it works where that is full."""
    return {
        "command": command,
        "date": date,
        "commit": _commit(),
        "device": device,
        "card": _card() if device == "cuda" else "none used",
        "GPUs": str(requirements.num_gpus()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda or "not in this torch"),
        "cuDNN": _cudnn() if device == "cuda" else "not used",
        "NCCL": _nccl(),
        "Triton": _version("triton"),
        "C compiler, for Triton": shutil.which("gcc") or shutil.which("clang") or "none found",
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} CPUs",
    }


def _commit() -> str:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return "unknown: the tree came without git"
    git = ["git", "-C", str(ROOT)]
    head = _output([*git, "rev-parse", "--short=12", "HEAD"])
    return f"{head}{', with changes' if _output([*git, 'status', '--porcelain']) else ''}" if head else "unknown"


def _card() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    lines = _output(query).splitlines() if shutil.which("nvidia-smi") else []
    return "; ".join(line.replace(",", ", driver", 1) for line in lines) or "unknown: nvidia-smi did not answer"


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cudnn() -> str:
    version: Any = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return str(version or "not in this torch")


def _nccl() -> str:
    if not requirements.has_nccl():
        return "not in this torch"
    from torch.cuda import nccl

    version: Any = nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(map(str, version))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def plain_table(records: Sequence[Record]) -> str:
    """Lay out one line per part."""
    lines = [("part", "status", "seconds", "")]
    lines += [(r["name"], r["status"], f"{r['seconds']:.1f}", _short(r["summary"])) for r in records]
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    rows = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in lines]
    return "\n".join([rows[0], "-" * max(map(len, rows)), *rows[1:]])


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"


def write(folder: Path, facts: dict[str, str], records: Sequence[Record]) -> Path:
    """Write gpu_check.json and gpu_check.md; return the path of the latter."""
    write_file(folder / "gpu_check.json", to_json({"facts": facts, "parts": records}))
    lines = ["# GPU check", "", *(f"- {name}: {value}" for name, value in facts.items()), "", "## Summary", ""]
    summary = [
        {k: r[k] for k in ("name", "status", "seconds")} | {"summary": " ".join(r["summary"].split())} for r in records
    ]
    lines += _markdown_table(summary) if summary else ["Nothing has run yet."]
    for record in records:
        lines += ["", *_section(record)]
    path = folder / "gpu_check.md"
    write_file(path, "\n".join(lines) + "\n")
    return path


def _section(record: Record) -> list[str]:
    name = record["name"]
    lines = [f"## {name}", "", f"{record['status']}: {_DESCRIPTIONS.get(name, name)}. {record['summary']}"]
    if record["failures"]:
        lines += ["", "Failures:", "", *(f"- {' '.join(text.split())}" for text in record["failures"])]
    if record.get("error"):
        lines += ["", "```", record["error"], "```"]
    for table in record["tables"]:
        lines += ["", f"### {table['title']}", "", *_markdown_table(table["rows"])]
        lines += ["", table["note"]] if table["note"] else []
    return lines


def _markdown_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    return lines + [f"| {' | '.join(format_value(row.get(column)) for column in columns)} |" for row in rows]


def format_value(value: Any) -> str:
    """Write a value of a row: three numbers as median and quartiles."""
    if value is None:
        return ""
    if isinstance(value, (list, tuple)) and len(value) == 3:
        low, median, high = map(format_value, value)
        return f"{median} ({low} to {high})"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value).replace("|", "\\|").replace("\n", " ")
