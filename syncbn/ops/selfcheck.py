"""Compare kernels that could not be run where they are meant for with the reference, on their first use there."""

import math
import warnings
from types import ModuleType

import torch
from torch import Tensor

from . import reference

_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 8e-2,
}  # relative, absolute below 1
_FORMATS = (torch.contiguous_format, torch.channels_last)


@torch.no_grad()
def passes(kernels: ModuleType, device: torch.device) -> bool:
    """Compare all primitives with the reference in float64, on small inputs of all dtypes and two memory formats.

    Channel 0 is constant, the mean of channel 1 is far from 0. No random number is drawn. Values are read back to the
    host. Where ``kernels`` differ or raise, one RuntimeWarning says what was found.
    """
    try:
        cases = [(dtype, memory_format) for dtype in _TOLERANCE for memory_format in _FORMATS]
        worst, name, case = max((*_worst(kernels, device, *case), str(case)) for case in cases)
        found = None if worst <= 1 else f"a deviation of {worst:.2g} times the tolerance in {name}, {case}"
    except Exception as error:  # of any kind: the reference goes on
        found = f"{type(error).__name__}: {error}"
    if found is not None:
        warnings.warn(
            f"{kernels.__name__} was compared with the reference kernels on {device}: expected equal results, got "
            f"{found}. This process goes on with the reference kernels there, which are slower. Please report it; "
            "SYNCBN_KERNELS=reference chooses them without a warning.",
            RuntimeWarning,
            stacklevel=3,
        )
    return found is None


def _worst(
    kernels: ModuleType, device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format
) -> tuple[float, str]:
    """Return the largest deviation, in tolerances, and the primitive it is in."""
    steps = torch.arange(6.0 * 5 * 5 * 5, dtype=torch.float64, device=device)
    x, dy = steps.square().sin().view(6, 5, 5, 5), steps.square().cos().view(6, 5, 5, 5)
    x[:, 0] = 0.75
    x[:, 1] += 50
    x, dy = (t.to(dtype, memory_format=memory_format) for t in (x, dy))
    mean, var = _mean_var(reference.local_sums(x.double()))
    channel = [mean, torch.rsqrt(var + 0.01), *steps[:10].view(2, 5) / 10]  # mean, invstd, weight, bias
    truth = _results(reference, x.double(), dy.double(), channel)
    ours = _results(kernels, x, dy, [t.to(reference.sum_dtype(x)) for t in channel])
    worst = 0.0, ""
    for name, true in truth.items():
        ratio = (ours[name] - true).abs() / (_TOLERANCE[dtype] * (1 + true.abs()))
        worst = max(worst, (ratio.nan_to_num(math.inf, math.inf).max().item(), name))
    return worst


def _results(kernels: ModuleType, x: Tensor, dy: Tensor, channel: list[Tensor]) -> dict[str, Tensor]:
    mean, invstd, weight, bias = channel
    packed = kernels.local_sums(x)
    sums = torch.cat(kernels.backward_sums(dy, x, mean, invstd)).double()
    return {
        "local_sums": torch.cat([*_mean_var(packed), packed[-1:]]),
        "normalize": kernels.normalize(x, mean, invstd, weight, bias).double(),
        "backward_sums": sums,
        "input_gradient": kernels.input_gradient(dy, x, mean, invstd, weight, sums, packed[-1]).double(),
    }


def _mean_var(packed: Tensor) -> tuple[Tensor, Tensor]:
    mean, sqmean = (packed[:-1] / packed[-1]).chunk(2)
    return mean, sqmean - mean.square()
