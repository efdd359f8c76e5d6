"""Check kernels against the reference on their first use: they may never have been run on this machine."""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .layout import SUM_DTYPE
from .reference import Running

# Relative, absolute below 1.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
# Of the input dtype, shape and memory format; the dtypes of weight, bias, running_mean and running_var.
Case = tuple[torch.dtype, tuple[int, ...], torch.memory_format, Sequence[torch.dtype | None]]
_PHASES = ("forward_reduce", "forward_apply", "backward_reduce", "backward_apply")
_FORMATS = (torch.contiguous_format, torch.channels_last)
_CASES: list[Case] = [(d, (6, 5, 5, 5), form, (SUM_DTYPE.get(d, d),) * 4) for d in _TOLERANCE for form in _FORMATS]


@torch.inference_mode(False)
@torch.no_grad()
def passes(name: str, kernels_for: Callable[..., Any], device: torch.device, cases: Iterable[Case] = _CASES) -> bool:
    """Compare all phases with the reference in float64, on small inputs of several kinds.

    Channel 0 is constant, the mean of channel 1 is far from 0. Values are read back to the host. Where the kernels of
    ``kernels_for(x, weight, bias, mean, var)`` differ or raise, a RuntimeWarning says what was found, by ``name``.
    """
    try:
        worst, phase, case = max((*_worst(kernels_for, device, case), str(case)) for case in cases)
        found = None if worst <= 1 else f"a deviation of {worst:.2g} times the tolerance in {phase}, {case}"
    except Exception as error:  # of any kind: the reference goes on
        found = f"{type(error).__name__}: {error}"
    if found is not None:
        warnings.warn(
            f"{name} was compared with the reference kernels on {device}: expected equal results, got "
            f"{found}. This process goes on with other kernels there, which are slower. Please report it; "
            "SYNCBN_KERNELS=reference chooses them without a warning.",
            RuntimeWarning,
            stacklevel=3,
        )
    return found is None


def _worst(kernels_for: Callable[..., Any], device: torch.device, case: Case) -> tuple[float, str]:
    """Return the largest deviation, in tolerances, and the phase it is in."""
    dtype, shape, memory_format, dtypes = case
    steps = torch.arange(math.prod(shape), dtype=torch.float64, device=device)
    x, dy = steps.square().sin().view(shape), steps.square().cos().view(shape)
    x[:, 0] = 0.75
    x[:, 1] += 50
    x, dy = (t.to(dtype, memory_format=memory_format) for t in (x, dy))
    values = torch.arange(4.0 * x.shape[1], dtype=torch.float64, device=device).view(4, -1) / (2 * x.shape[1])
    mine = [None if of is None else t.to(of) for t, of in zip(values, dtypes, strict=True)]
    wide = [None if t is None else t.double() for t in mine]
    true, given = _run(reference, x.double(), dy.double(), wide)
    found, _ = _run(kernels_for(x, *mine), x, dy, mine, given)
    errors = [(a - b).abs() / (_TOLERANCE[dtype] * (1 + b.abs())) for a, b in zip(found, true, strict=True)]
    return max(
        (e.nan_to_num(math.inf, math.inf).max().item(), phase) for e, phase in zip(errors, _PHASES, strict=True)
    )


def _run(
    kernels: Any, x: Tensor, dy: Tensor, per_channel: list[Tensor | None], given: tuple[Tensor, ...] | None = None
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Run the phases, each on what is ``given``, else on the results before; return all results, and what to give."""
    weight, bias, mean, var = (None if t is None else t.clone() for t in per_channel)
    counted = torch.zeros((), dtype=torch.int64, device=x.device)
    packed = kernels.forward_reduce(x, counted)
    use = given or (packed,)
    y, statistics = kernels.forward_apply(x, use[0], weight, bias, Running(mean, var, None, 0.3), 0.01)
    use = given or (packed, statistics)
    sums, *gradients = kernels.backward_reduce(
        dy, x, use[1], *(None if t is None else t.dtype for t in (weight, bias))
    )
    use = given or (packed, statistics, sums)
    dx = kernels.backward_apply(dy, x, use[1], weight, use[2])
    results = [*reference.moments(packed), packed[-1:], counted], [y, statistics, mean, var], [sums, *gradients], [dx]
    return [torch.cat([t.double().flatten() for t in ts if t is not None]) for ts in results], use
