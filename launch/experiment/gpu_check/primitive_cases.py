"""The inputs on which primitives are compared, and the comparison of one back end on one of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from . import truth
from .inputs import TOLERANCE, error_of, full

PRIMITIVES = ("local_sums", "normalize", "backward_sums", "input_gradient")
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_SHAPES: tuple[tuple[str, tuple[int, ...], float], ...] = (  # layout, shape, mean
    ("contiguous", (6, 7, 5, 4), 0.5),
    ("channels_last", (6, 8, 5, 4), 0.5),
    ("contiguous", (33, 7), 0.5),
    ("contiguous", (6, 7, 9), 0.5),
    ("contiguous", (3, 4, 2, 3, 4), 0.5),
    ("channels_last", (3, 4, 2, 3, 4), 0.5),
    ("contiguous", (9, 5, 1, 1), 0.5),
    ("contiguous", (4, 3, 16, 16), 50.0),  # mean/std up to 100 by channel, up to which float32 promises 2e-5
    ("channels_last", (4, 3, 16, 16), 50.0),
    ("contiguous", (8, 32, 56, 56), 0.5),  # sums of many values, several blocks of a kernel
    ("channels_last", (8, 32, 56, 56), 0.5),
)
_NOT_DENSE: tuple[tuple[str, tuple[int, ...], float], ...] = (
    ("strided", (6, 7, 5, 4), 0.5),
    ("permuted", (6, 7, 5), 0.5),
    ("contiguous", (0, 5, 4, 4), 0.5),
)
Deviation = tuple[str, float, float, str]  # primitive, error, tolerance, another problem


@dataclass
class Case:
    """One input with everything around it."""

    layout: str
    label: str  # shape, mean and parameters
    x: Tensor
    dy: Tensor
    weight: Tensor | None
    bias: Tensor | None
    is_dense: bool


def make_cases(dtype: torch.dtype, device: str, dense: bool) -> list[Case]:
    """Draw the inputs of one dtype; with ``dense`` those that every back end takes."""
    cases: list[Case] = []
    for layout, shape, mean in _SHAPES + (() if dense else _NOT_DENSE):
        generator = torch.Generator().manual_seed(len(cases))
        kinds = {"no weight": None, f"weight {full(dtype)}": full(dtype), f"weight {dtype}": dtype}
        x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        x = x * torch.linspace(0.5, 2, shape[1]).double().view(-1, *[1] * (len(shape) - 2)) + mean
        x, dy = (_lay_out(t.to(device, dtype), layout) for t in (x, dy))
        for kind, of in kinds.items():
            weight, bias = (None if of is None else _parameter(shape[1], seed, device, of) for seed in (1, 2))
            label = f"{'x'.join(map(str, shape))}, mean {mean:g}, {kind.replace('torch.', '')}"
            cases.append(Case(layout, label, x, dy, weight, bias, dense))
    return cases


def _parameter(num_features: int, seed: int, device: str, dtype: torch.dtype) -> Tensor:
    return (torch.rand(num_features, generator=torch.Generator().manual_seed(seed)) + 0.5).to(device, dtype)


def _lay_out(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return x.contiguous(memory_format=_LAST[x.dim()])
    if layout == "strided":
        return torch.stack([x, x + 1], dim=-1)[..., 0]
    if layout == "permuted":
        return x.transpose(0, 2).contiguous().transpose(0, 2)
    return x


@torch.no_grad()
def deviations(module: ModuleType, case: Case) -> Iterator[Deviation]:
    """Compare the four primitives of one back end; each gets the true results of the others."""
    x, dy, dtype = case.x, case.dy, case.x.dtype
    count = x.numel() // x.shape[1]
    true_mean, true_var = truth.mean_var(x) if count else (torch.zeros(x.shape[1]).double(),) * 2
    mean, invstd = (t.to(x.device, full(dtype)) for t in (true_mean, torch.rsqrt(true_var + 1e-5)))
    sums = torch.cat(truth.gradient_sums(dy, x, mean, invstd))
    sum_scale, value = truth.spread(dy), TOLERANCE[dtype]
    of_sums = TOLERANCE[full(dtype)]  # sums are float32 or better, whatever the input

    yield _check("local_sums", of_sums, lambda: _statistics_error(module.local_sums(x), true_mean, true_var, count))
    yield _check(
        "normalize", value,
        lambda: _map_error(
            module.normalize(x, mean, invstd, case.weight, case.bias),
            truth.normalized(x, mean, invstd, case.weight, case.bias), case, 0.0,
        ),
    )  # fmt: skip
    yield _check(
        "backward_sums", of_sums,
        lambda: error_of(torch.cat(module.backward_sums(dy, x, mean, invstd)), sums, max(truth.norm(sums), sum_scale)),
    )  # fmt: skip
    # as if another rank had as many values, whose sums are not small beside them
    total, total_count = sums + count * torch.linspace(0.5, 1.5, len(sums)).double(), max(2 * count, 1)
    arguments = dy, x, mean, invstd, case.weight, total.to(x.device)
    on_device = torch.tensor(float(total_count), dtype=torch.float64, device=x.device)
    yield _check(
        "input_gradient", value,
        lambda: _map_error(
            module.input_gradient(*arguments, on_device),
            truth.input_gradient(*arguments, total_count), case, truth.norm(dy),
        ),
    )  # fmt: skip


def _check(primitive: str, tolerance: float, error: Callable[[], float | str]) -> Deviation:
    try:
        found = error()
    except Exception as problem:  # of any kind: the other primitives go on
        text = f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0]}"
        return primitive, math.inf, tolerance, text
    return (primitive, math.inf, tolerance, found) if isinstance(found, str) else (primitive, found, tolerance, "")


def _statistics_error(packed: Tensor, mean: Tensor, var: Tensor, count: int) -> float | str:
    """Return the error of what the sums say: of the mean in standard deviations, of the variance relative to it."""
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


def _map_error(found: Tensor, true: Tensor, case: Case, scale: float) -> float | str:
    """Return the error of an output of the input's size, relative to its largest value or to ``scale``."""
    if found.dtype != case.x.dtype or found.shape != case.x.shape:
        return f"expected {tuple(case.x.shape)} of {case.x.dtype}, got {tuple(found.shape)} of {found.dtype}"
    if case.is_dense and found.stride() != case.x.stride():
        return f"expected strides {case.x.stride()}, got {found.stride()}"
    return error_of(truth.per_channel(found), true, max(truth.norm(true), scale))
