"""How far the phases of one back end are from float64, on one input."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn.ops.reference import Running

from . import float64_reference
from .inputs import TOLERANCE, error_of, full
from .phase_cases import MOMENTUM, NUM_BATCHES, Case

PHASES = ("forward_reduce", "forward_apply", "backward_reduce", "backward_apply")
_EPS = 1e-5
# Where mean/std is 1e4 the variance is within 1e-4, and y within 3e-7 * mean/std, here of values up to 4. Of 1 / std
# float64 sums leave 1e-16 * (mean/std)**2.
_STEEP = {"sums": 1e-4, "y": 7e-4, "statistics": 1e-7}


class Deviation(NamedTuple):
    """Of one result of a phase; `problem` says what an error cannot say."""

    phase: str
    what: str
    error: float
    tolerance: float
    problem: str = ""


KernelsFor = Callable[..., Any]  # finds the kernels for x, weight, bias, running_mean and running_var, or None
_Result = tuple[str, float | str, float]  # what, its error or what is wrong with it, tolerance


@torch.no_grad()
def deviations(kernels_for: KernelsFor, case: Case) -> Iterator[Deviation]:
    """Compare the four phases of one back end; each gets the true results of those before it."""
    kernels = kernels_for(case.x, case.weight, case.bias, case.running_mean, case.running_var)
    moments = float64_reference.moments(case.x)
    for phase, compare in _COMPARISONS.items():
        try:
            if kernels is None:
                raise LookupError("expected kernels for this input, got none")
            results = list(compare(kernels, case, moments))
        except Exception as problem:  # of any kind: the other phases go on
            text = f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0]}"
            yield Deviation(phase, "all", math.inf, 1.0, text)
            continue
        for what, found, tolerance in results:
            if isinstance(found, str):
                yield Deviation(phase, what, math.inf, tolerance, found)
            else:
                yield Deviation(phase, what, found, tolerance)


def _forward_reduce(kernels: Any, case: Case, moments: float64_reference.Moments) -> Iterator[_Result]:
    num_batches = torch.tensor(NUM_BATCHES - 1, device=case.x.device)
    packed = kernels.forward_reduce(case.x, num_batches)
    # the passes over x are in float32 or better, whatever the input
    yield "sums", sums_error(packed, moments), _STEEP["sums"] if case.is_steep else TOLERANCE[full(case.x.dtype)]
    found = int(num_batches)
    yield "num_batches_tracked", 0.0 if found == NUM_BATCHES else f"expected {NUM_BATCHES}, got {found}", 1.0


def _forward_apply(kernels: Any, case: Case, moments: float64_reference.Moments) -> Iterator[_Result]:
    x, device = case.x, case.x.device
    moving = case.running_mean.clone(), case.running_var.clone()
    running = Running(*moving, torch.tensor(NUM_BATCHES, device=device), case.momentum)
    y, statistics = kernels.forward_apply(x, moments.sums().to(device), case.weight, case.bias, running, _EPS)
    true = moments.statistics(_EPS)
    error = _map_error(y, float64_reference.normalized(x, true, case.weight, case.bias), case, 0.0)
    yield "y", error, _STEEP["y"] if case.is_steep else TOLERANCE[x.dtype]
    tolerance = _STEEP["statistics"] if case.is_steep else TOLERANCE[torch.float64]  # whatever the input
    yield "statistics", _statistics_error(statistics, true), tolerance
    momentum = 1 / NUM_BATCHES if case.momentum is None else MOMENTUM
    moved = moments.moved(case.running_mean, case.running_var, momentum)
    for name, mine, other in zip(("running_mean", "running_var"), moving, moved, strict=True):
        yield name, error_of(mine, other), TOLERANCE[mine.dtype]


def _backward_reduce(kernels: Any, case: Case, moments: float64_reference.Moments) -> Iterator[_Result]:
    x, dy, statistics = case.x, case.dy, moments.statistics(_EPS)
    dtypes = [None if t is None else t.dtype for t in (case.weight, case.bias)]
    packed, *gradients = kernels.backward_reduce(dy, x, statistics.to(x.device), *dtypes)
    sums = float64_reference.gradient_sums(dy, x, statistics)
    scale, tolerance = max(float64_reference.norm(sums), float64_reference.spread(dy)), TOLERANCE[full(x.dtype)]
    yield "sums", _per_channel_error(packed, sums, torch.float64, scale), tolerance
    true_bias, true_weight = sums.chunk(2)
    for name, found, true, dtype in zip(
        ("grad_weight", "grad_bias"), gradients, (true_weight, true_bias), dtypes, strict=True
    ):
        if dtype is None:
            yield name, 0.0 if found is None else "expected none, got one", 1.0
        else:
            yield name, _per_channel_error(found, true, dtype, scale), max(tolerance, TOLERANCE[dtype])


def _backward_apply(kernels: Any, case: Case, moments: float64_reference.Moments) -> Iterator[_Result]:
    x, dy, sums = case.x, case.dy, float64_reference.gradient_sums(case.dy, case.x, moments.statistics(_EPS))
    # as if another rank had as many values, whose sums are not small beside these
    total = sums + moments.num * torch.linspace(0.5, 1.5, len(sums)).double()
    statistics = moments.statistics(_EPS)
    statistics[-1] = max(2 * moments.num, 1)
    dx = kernels.backward_apply(dy, x, statistics.to(x.device), case.weight, total.to(x.device))
    true = float64_reference.backward_apply(dy, x, statistics, case.weight, total)
    yield "dx", _map_error(dx, true, case, float64_reference.norm(dy)), TOLERANCE[x.dtype]


_COMPARISONS: dict[str, Callable[[Any, Case, float64_reference.Moments], Iterator[_Result]]] = dict(
    zip(PHASES, (_forward_reduce, _forward_apply, _backward_reduce, _backward_apply), strict=True)
)


def sums_error(packed: Tensor, moments: float64_reference.Moments) -> float | str:
    """Return the error of what the sums say: of the mean in standard deviations, of the variance relative to it."""
    mean, var, count = moments
    if packed.dtype != torch.float64 or packed.shape != (2 * len(mean) + 1,):
        return f"expected (2C + 1,) numbers of float64, got {tuple(packed.shape)} of {packed.dtype}"
    packed = packed.cpu()
    if float(packed[-1]) != count:
        return f"expected a count of {count}, got {float(packed[-1]):.6g}"
    if count == 0:
        return "expected zeros for an empty input" if packed.any() else 0.0
    found, sqmean = (packed[:-1] / count).chunk(2)
    errors = torch.cat([(found - mean) / var.sqrt(), (sqmean - found.square() - var) / var])
    return error_of(errors, torch.zeros_like(errors), 1.0)


def _statistics_error(found: Tensor, true: Tensor) -> float | str:
    """Return the error of the mean in standard deviations, or that of invstd relative to it."""
    if found.dtype != torch.float64 or found.shape != true.shape:
        return f"expected (2C + 1,) numbers of float64, got {tuple(found.shape)} of {found.dtype}"
    found = found.cpu()
    if found[-1] != true[-1]:
        return f"expected a count of {float(true[-1]):.6g}, got {float(found[-1]):.6g}"
    (mean, invstd), (true_mean, true_invstd) = found[:-1].chunk(2), true[:-1].chunk(2)
    errors = torch.cat([(mean - true_mean) * true_invstd, invstd / true_invstd - 1])
    return error_of(errors, torch.zeros_like(errors), 1.0)


def _per_channel_error(found: Tensor | None, true: Tensor, dtype: torch.dtype, scale: float) -> float | str:
    if found is None or found.dtype != dtype or found.shape != true.shape:
        got = "none" if found is None else f"{tuple(found.shape)} of {found.dtype}"
        return f"expected {tuple(true.shape)} of {dtype}, got {got}"
    return error_of(found, true, scale)


def _map_error(found: Tensor, true: Tensor, case: Case, scale: float) -> float | str:
    """Return the error of an output of the input's size, relative to its largest value or to ``scale``."""
    if found.dtype != case.x.dtype or found.shape != case.x.shape:
        return f"expected {tuple(case.x.shape)} of {case.x.dtype}, got {tuple(found.shape)} of {found.dtype}"
    if case.is_dense and found.stride() != case.x.stride():
        return f"expected strides {case.x.stride()}, got {found.stride()}"
    return error_of(float64_reference.per_channel(found), true, max(float64_reference.norm(true), scale))
