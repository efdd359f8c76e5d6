"""Check kernels against the reference on their first use: they may never have been run on this machine."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference
from .layout import SUM_DTYPE

# Relative, absolute below 1.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
_FORMATS = (torch.contiguous_format, torch.channels_last)


@torch.inference_mode(False)
@torch.no_grad()
def passes(name: str, kernels_for: Callable[..., Any], device: torch.device) -> bool:
    """Compare all phases with the reference in float64, on small inputs of all dtypes and two memory formats.

    Channel 0 is constant, the mean of channel 1 is far from 0. No random number is drawn. Values are read back to the
    host. Where the kernels differ or raise, one RuntimeWarning says what was found, by ``name``. ``kernels_for``
    returns them for an input, weight, bias, running_mean and running_var.
    """
    try:
        cases = [(dtype, memory_format) for dtype in _TOLERANCE for memory_format in _FORMATS]
        worst, phase, case = max((*_worst(kernels_for, device, *case), str(case)) for case in cases)
        found = None if worst <= 1 else f"a deviation of {worst:.2g} times the tolerance in {phase}, {case}"
    except Exception as error:  # of any kind: the reference goes on
        found = f"{type(error).__name__}: {error}"
    if found is not None:
        warnings.warn(
            f"{name} was compared with the reference kernels on {device}: expected equal results, got "
            f"{found}. This process goes on with the reference kernels there, which are slower. Please report it; "
            "SYNCBN_KERNELS=reference chooses them without a warning.",
            RuntimeWarning,
            stacklevel=3,
        )
    return found is None


def _worst(
    kernels_for: Callable[..., Any], device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format
) -> tuple[float, str]:
    """Return the largest deviation, in tolerances, and the phase it is in."""
    steps = torch.arange(6.0 * 5 * 5 * 5, dtype=torch.float64, device=device)
    x, dy = steps.square().sin().view(6, 5, 5, 5), steps.square().cos().view(6, 5, 5, 5)
    x[:, 0] = 0.75
    x[:, 1] += 50
    x, dy = (t.to(dtype, memory_format=memory_format) for t in (x, dy))
    channel = steps[:20].view(4, 5) / 10  # weight, bias, running_mean, running_var
    mine = channel.to(SUM_DTYPE.get(dtype, dtype))
    packed = reference.forward_reduce(x.double())
    _, statistics = reference.forward_apply(x.double(), packed, channel[0], channel[1], reference.Running(), 0.01)
    sums, _, _ = reference.backward_reduce(dy.double(), x.double(), statistics, None, None)
    given = packed, statistics, sums
    truth = _results(reference, x.double(), dy.double(), channel, given)
    ours = _results(kernels_for(x, *mine), x, dy, mine, given)
    worst = 0.0, ""
    for phase, true in truth.items():
        ratio = (ours[phase] - true).abs() / (_TOLERANCE[dtype] * (1 + true.abs()))
        worst = max(worst, (ratio.nan_to_num(math.inf, math.inf).max().item(), phase))
    return worst


def _results(kernels: Any, x: Tensor, dy: Tensor, channel: Tensor, given: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Run the phases; each is given the true results of those before."""
    (weight, bias, mean, var), (packed, statistics, sums) = channel.clone(), given
    found = kernels.forward_reduce(x)
    forward = kernels.forward_apply(x, packed, weight, bias, reference.Running(mean, var, None, 0.3), 0.01)
    backward = kernels.backward_reduce(dy, x, statistics, weight.dtype, bias.dtype)
    return {
        "forward_reduce": torch.cat([*reference.moments(found), found[-1:]]),
        "forward_apply": torch.cat([t.double().flatten() for t in (*forward, mean, var)]),
        "backward_reduce": torch.cat([t.double() for t in backward]),
        "backward_apply": kernels.backward_apply(dy, x, statistics, weight, sums).double(),
    }
