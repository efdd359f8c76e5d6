"""Part `phases`: the four phases of every back end of the device against float64, each deviation named.

A back end that fails its self-check is replaced by others within the library. Here it is run all the same, so that the
report says which phase is wrong and by how much, and the failed self-check is a failure of its own. That of `triton`
is run for each kind of input, as in the library.
"""

import warnings
from typing import Any
from unittest import mock

import torch

from syncbn.ops import cpu, cuda, reference, selfcheck, triton

from . import requirements
from .inputs import DTYPES, name_of
from .phase_cases import Case, make_cases
from .phase_errors import PHASES, KernelsFor, deviations
from .result import Outcome, Row, Table

BACK_ENDS = {"cpu": ("reference", "cpu"), "cuda": ("reference", "cuda", "triton")}


def measure(device: str) -> Outcome:
    """Compare all phases of all back ends."""
    rows: list[Row] = []
    failures: list[str] = []
    absent = []
    for name in BACK_ENDS[device]:
        reason = _open(name)
        if reason is not None:
            absent.append(f"{name} is not available: {reason}")
            if "FileNotFoundError" not in reason:  # of a compiler; all else is a fault
                failures.append(absent[-1])
            continue
        refused: list[str] = []
        kernels_for = _kernels_for(name, refused)
        for dtype in DTYPES:
            row, found = _compare(name, kernels_for, make_cases(dtype, device, name), dtype)
            rows.append(row)
            failures += found
        if name in ("cpu", "cuda"):
            refused += _self_check(name, kernels_for, torch.device(device))
        failures += refused
    worst = max((max(row[name] for name in PHASES) for row in rows), default=0.0)
    num = sum(row["inputs"] for row in rows)
    summary = "; ".join([f"{num} inputs, worst error {worst:.2g} of the tolerance", *absent])
    note = "Largest error over the inputs and over a phase's results, as a part of the tolerance: 1 is a failure."
    return Outcome(summary, [Table("Phases against float64", rows, note)], failures)


def _open(name: str) -> str | None:
    """Make a back end ready without its self-check; return why that is not possible."""
    if name == "triton":
        return requirements.import_problem("triton") or None
    if name != "cpu":
        return None
    with mock.patch.object(selfcheck, "passes", return_value=True):
        is_ready = cpu.is_ready(quietly=True)
    return None if is_ready else cpu._problem or "it is not in this process"


def _kernels_for(name: str, refused: list[str]) -> KernelsFor:
    """Return what finds the kernels of a back end; that of `triton` adds what its self-check finds to ``refused``."""
    check = selfcheck.passes

    def note(name: str, kernels_for: Any, device: torch.device, *cases: Any) -> bool:
        refused.extend(_self_check(name, kernels_for, device, *cases, check=check))
        return True

    def find(*tensors: Any) -> Any:
        with mock.patch.object(selfcheck, "passes", note):
            return triton.kernels_for(*tensors, quietly=False)

    found: dict[str, KernelsFor] = {"cpu": cpu.kernels_for, "triton": find}
    return found.get(name, lambda *_: {"reference": reference, "cuda": cuda}[name])


def _self_check(name: str, kernels_for: KernelsFor, device: torch.device, *cases: Any, check: Any = None) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        passed = (check or selfcheck.passes)(name, kernels_for, device, *cases)
    return [] if passed else [f"{name}: the self-check failed: {'; '.join(str(w.message) for w in caught)}"]


def _compare(name: str, kernels_for: KernelsFor, cases: list[Case], dtype: torch.dtype) -> tuple[Row, list[str]]:
    """Return a row of the worst errors, in tolerances, and a line for each phase and layout that deviates."""
    worst = dict.fromkeys(PHASES, 0.0)
    found: dict[tuple[str, str], dict[str, tuple[float, str]]] = {}  # by input: its worst error, in tolerances
    for case in cases:
        for phase, what, error, tolerance, problem in deviations(kernels_for, case):
            ratio = error / tolerance
            worst[phase] = max(worst[phase], ratio)
            if ratio > 1 or problem:
                text = f"{case.label}: {what}: {problem or f'error {error:.3g}, tolerance {tolerance:.3g}'}"
                errors = found.setdefault((phase, case.layout), {})
                errors[case.label] = max(errors.get(case.label, (0.0, "")), (ratio, text))
    failures = [
        f"{name}.{phase}, {name_of(dtype)}, {layout}: {len(errors)} inputs, worst {max(errors.values())[1]}"
        for (phase, layout), errors in found.items()
    ]
    return {"back end": name, "dtype": name_of(dtype), "inputs": len(cases), **worst}, failures
