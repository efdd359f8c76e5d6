"""Part `primitives`: every back end of the device against float64, by itself, each deviation named.

A back end that fails its self-check is replaced by the reference within the library. Here it is run all the same, so
that the report says which primitive is wrong and by how much, and the failed self-check is a failure of its own.
"""

from __future__ import annotations

import warnings
from types import ModuleType
from unittest import mock

import torch

from syncbn import kernels
from syncbn.ops import selfcheck

from .inputs import DTYPES, name_of
from .outcome import Outcome, Row, Table
from .primitive_cases import PRIMITIVES, Case, deviations, make_cases

BACK_ENDS = {"cpu": ("reference", "native", "fused"), "cuda": ("reference", "cuda")}


def measure(device: str) -> Outcome:
    """Compare all primitives of all back ends."""
    rows: list[Row] = []
    failures: list[str] = []
    absent = []
    for name in BACK_ENDS[device]:
        module: ModuleType = getattr(kernels, name)
        reason = _open(name)
        if reason is not None:
            absent.append(f"{name} is not available: {reason}")
            if "FileNotFoundError" not in reason:  # of a compiler; all else is a fault
                failures.append(absent[-1])
            continue
        for dtype in DTYPES:
            row, found = _compare(name, module, make_cases(dtype, device, dense=name != "reference"), dtype)
            rows.append(row)
            failures += found
        if name != "reference":
            failures += _self_check(name, module, device)
    worst = max((max(row[name] for name in PRIMITIVES) for row in rows), default=0.0)
    num = sum(row["inputs"] for row in rows)
    summary = "; ".join([f"{num} inputs, worst error {worst:.2g} of the tolerance", *absent])
    note = "Largest error over the inputs, as a part of the tolerance: 1 is a failure."
    return Outcome(summary, [Table("Primitives against float64", rows, note)], failures)


def _open(name: str) -> str | None:
    """Make a back end ready without its self-check; return why that is not possible."""
    if name != "fused":
        return None
    with mock.patch.object(selfcheck, "passes", return_value=True):
        is_ready = kernels.fused.is_ready(quietly=True)
    return None if is_ready else kernels.fused._problem or "it is not in this process"


def _self_check(name: str, module: ModuleType, device: str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        passed = selfcheck.passes(module, torch.device(device))
    return [] if passed else [f"{name}: the self-check failed: {'; '.join(str(w.message) for w in caught)}"]


def _compare(name: str, module: ModuleType, cases: list[Case], dtype: torch.dtype) -> tuple[Row, list[str]]:
    """Return a row of the worst errors, in tolerances, and a line for each primitive and layout that deviates."""
    worst = dict.fromkeys(PRIMITIVES, 0.0)
    found: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for case in cases:
        for primitive, error, tolerance, problem in deviations(module, case):
            worst[primitive] = max(worst[primitive], error / tolerance)
            if error > tolerance or problem:
                what = problem or f"error {error:.3g}, tolerance {tolerance:.3g}"
                found.setdefault((primitive, case.layout), []).append((error, f"{case.label}: {what}"))
    failures = [
        f"{name}.{primitive}, {name_of(dtype)}, {layout}: {len(errors)} inputs, worst {max(errors)[1]}"
        for (primitive, layout), errors in found.items()
    ]
    return {"back end": name, "dtype": name_of(dtype), "inputs": len(cases), **worst}, failures
