"""Run each part in a process of its own, within its time: a crash, a hang or a full memory costs one part."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from .registry import Part
from .result import FAILED, Record, make_record

ROOT = Path(__file__).resolve().parents[3]
_NUM_LINES = 12  # of the log of a part that left no record


def run_parts(parts: Iterable[Part], device: str, folder: Path, show: Callable[[list[Record]], None]) -> list[Record]:
    """Run the parts one after the other.

    Args:
        parts: What to run.
        device: "cuda" or "cpu".
        folder: For logs and records, made if it is missing.
        show: Called with all records so far after each part, and before the first with none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records: list[Record] = []
    show(records)
    for part in parts:
        records.append(run_part(part, device, folder))
        show(records)
    return records


def run_part(part: Part, device: str, folder: Path) -> Record:
    """Run one part to its end, or to its time limit, and return its record."""
    log, path = folder / f"{part.name}.log", folder.resolve() / f"{part.name}.json"
    path.unlink(missing_ok=True)  # of an earlier run
    command = [sys.executable, "-m", "experiment.gpu_check.worker", json.dumps(asdict(part)), device, str(path)]
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment(), cwd=ROOT, start_new_session=True
        )
        try:
            code: int | None = process.wait(part.limit(device))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    record = _read(path) if code == 0 else None
    if record is None:
        record = _without_record(part, device, code, log)
    record["seconds"] = round(time.monotonic() - start, 1)
    return record


def environment() -> dict[str, str]:
    """Return the environment of a part: the tree is imported, installed or not."""
    paths = [str(ROOT), str(ROOT / "launch"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a part and what it started: all are in its session."""
    with suppress(ProcessLookupError):  # nothing is left of it
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(path: Path) -> Record | None:
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record


def _without_record(part: Part, device: str, code: int | None, log: Path) -> Record:
    if code is None:
        text = f"passed its time limit of {part.limit(device):g} s"
    elif code < 0:
        text = f"ended by signal {_signal_name(-code)}"
    else:
        text = f"ended with exit code {code} and no result"
    last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_NUM_LINES:]
    return make_record(part.name, FAILED, text, failures=[text], error="\n".join(last) or "(it printed nothing)")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
