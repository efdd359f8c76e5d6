"""The results file: a first line with the settings that all cells share, then one line per finished cell.

Lines are only ever appended, each in one write that reaches the disk, so a run killed at any moment loses at most the
cell it was writing. JSON only: nothing in it is ever executed.
"""

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from experiment.training.saved_settings import flatten

Row = dict[str, Any]
START = b'{"grid": {'  # of the first line


class Results:
    """Open the results of one grid, made if they do not exist, and locked: one process at a time may append.

    Args:
        path: The file.
        grid: What all cells have in common, as JSON types.
        made_with: Versions and device of this process.

    Raises:
        ValueError: another process holds the file; it is no results file, or one of another grid. Nothing is changed.
    """

    def __init__(self, path: Path, grid: Row, made_with: Row) -> None:
        self.path, self.notes = path, list[str]()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(f"{path}.lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"another comparison is writing to {path}: wait for it, or set output_dir") from None
        try:
            self._read(grid)
            self.others = sorted({other for row in self.rows.values() if (other := _differs(row, made_with))})
            if self._header is None:
                self.append({"grid": grid})
        except BaseException:
            self._lock.release()
            raise

    def _read(self, grid: Row) -> None:
        """Read the rows, the last one of each cell, and check that they are of this grid."""
        self._header: Row | None = None
        self.rows: dict[str, Row] = {}
        raw = self.path.read_bytes() if self.path.exists() else b""
        self._ends_whole = raw.endswith(b"\n") or not raw
        for number, line in enumerate(raw.splitlines(), 1):
            content = _parse(line)
            if content is None and self._header is None and not (START.startswith(line) or line.startswith(START)):
                raise self._foreign(number)
            if content is None:
                where = f"{self.path.name}, line {number}"
                self.notes.append(f"{where}: incomplete (a run was killed); what it held runs again")
            elif "grid" in content and self._header is None:
                self._header = content
                _check_same(content["grid"], grid, self.path)
            elif self._header is None or not isinstance(content.get("cell"), str) or "status" not in content:
                raise self._foreign(number)
            else:
                self.rows[content["cell"]] = content

    def _foreign(self, number: int) -> ValueError:
        return ValueError(f"{self.path}, line {number}: not a line of a comparison's results; set output_dir")

    def append(self, row: Row) -> None:
        """Add a line and wait until it is on the disk; numbers that are not finite become null."""
        row = _finite(row)
        line = json.dumps(row, allow_nan=False) + "\n"
        with self.path.open("ab") as file:
            file.write((b"" if self._ends_whole else b"\n") + line.encode())
            file.flush()
            os.fsync(file.fileno())
        self._ends_whole = True
        if "cell" in row:
            self.rows[row["cell"]] = row

    def __enter__(self) -> "Results":
        """Hold the lock."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Release it."""
        self._lock.release()


def _parse(line: bytes) -> Row | None:
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _differs(row: Row, made_with: Row) -> str | None:
    """Say with what a row was made, if not with `made_with`."""
    if row.get("status") != "done":
        return None
    versions = {**row["versions"], "device": row["device"].split(":")[0]}
    different = [f"{k} {versions.get(k)}" for k, v in made_with.items() if versions.get(k) != v]
    return ", ".join(different) or None


def _check_same(theirs: Row, ours: Row, path: Path) -> None:
    old, new = flatten(theirs), flatten(ours)
    different = [f"{k}: {old.get(k)!r} there, {new.get(k)!r} here" for k in {**old, **new} if old.get(k) != new.get(k)]
    if different:
        raise ValueError("\n  ".join([f"{path} holds results of another grid; set output_dir:", *different]))
