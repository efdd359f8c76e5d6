"""What a part of the check finds out, in values that JSON can hold."""

import json
import math
from dataclasses import dataclass, field
from typing import Any

OK, FAILED, SKIPPED = "ok", "failed", "skipped"

Row = dict[str, Any]  # by column: text, a number, or [low, median, high]
Record = dict[str, Any]  # of one part: name, status, seconds, summary, failures, error, tables


@dataclass
class Table:
    """Rows of equal keys, which are the columns."""

    title: str
    rows: list[Row]
    note: str = ""


@dataclass
class Outcome:
    """What a part measured; any of `failures` makes it a failed part."""

    summary: str
    tables: list[Table] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def make_record(name: str, status: str, summary: str, **more: Any) -> Record:
    """Fill in what a record has in any case."""
    return {"name": name, "status": status, "seconds": 0.0, "summary": summary, "failures": [], "tables": []} | more


def to_json(value: Any) -> str:
    """Write JSON; what it has no type or no number for, as text."""
    return json.dumps(_plain(value), indent=1, default=str, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
