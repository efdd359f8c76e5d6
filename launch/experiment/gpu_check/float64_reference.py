"""What the four phases must give, in float64 and in the formulas of the paper: nothing of syncbn is used.

Ioffe & Szegedy 2015, algorithm 1 and the gradients below it. Inputs are seen as ``(C, n)``. All is on the CPU.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Mean and biased variance per channel, ``(C,)``, of ``num`` values each; 0 without values."""

    mean: Tensor
    var: Tensor
    num: int

    def sums(self) -> Tensor:
        """Return ``[sum, sqsum, count]``, ``(2C + 1,)``."""
        return torch.cat([self.mean, self.var + self.mean.square(), torch.ones(1).double()]) * self.num

    def statistics(self, eps: float) -> Tensor:
        """Return ``[mean, invstd, count]``, ``(2C + 1,)``."""
        return torch.cat([self.mean, torch.rsqrt(self.var + eps), torch.full((1,), self.num).double()])

    def moved(self, running_mean: Tensor, running_var: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
        """Return the running statistics after this batch, the same as before where it has no values."""
        mean, var = (t.detach().cpu().double() for t in (running_mean, running_var))
        if not self.num:
            return mean, var
        unbiased = self.var * self.num / (self.num - 1)
        return mean + momentum * (self.mean - mean), var + momentum * (unbiased - var)


def per_channel(x: Tensor) -> Tensor:
    """Return the values as ``(C, n)``, float64, on the CPU."""
    return x.detach().cpu().double().movedim(1, 0).flatten(1)


def moments(x: Tensor) -> Moments:
    """Compute mean and biased variance per channel, by two passes."""
    values = per_channel(x)
    num = values.shape[1]
    if not num:
        return Moments(torch.zeros(len(values)).double(), torch.zeros(len(values)).double(), 0)
    mean = values.mean(1)
    return Moments(mean, (values - mean[:, None]).square().mean(1), num)


def normalized(x: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Compute ``y``, ``(C, n)``."""
    y = _xhat(x, statistics)
    y = y if weight is None else y * _column(weight)
    return y if bias is None else y + _column(bias)


def gradient_sums(dy: Tensor, x: Tensor, statistics: Tensor) -> Tensor:
    """Compute ``[sum_dy, sum_dy_xhat]``, ``(2C,)``."""
    return torch.cat([per_channel(dy).sum(1), (per_channel(dy) * _xhat(x, statistics)).sum(1)])


def backward_apply(dy: Tensor, x: Tensor, statistics: Tensor, weight: Tensor | None, sums: Tensor) -> Tensor:
    """Compute ``dx``, ``(C, n)``, for sums over a batch of as many values per channel as ``statistics`` say."""
    mean_dy, mean_dy_xhat = (sums / statistics[-1]).view(2, -1, 1)
    _, invstd = statistics[:-1].chunk(2)
    dx: Tensor = (per_channel(dy) - mean_dy - _xhat(x, statistics) * mean_dy_xhat) * _column(invstd)
    return dx if weight is None else dx * _column(weight)


def _xhat(x: Tensor, statistics: Tensor) -> Tensor:
    mean, invstd = statistics[:-1].chunk(2)
    return (per_channel(x) - _column(mean)) * _column(invstd)


def _column(values: Tensor) -> Tensor:
    column: Tensor = values.detach().cpu().double()[:, None]
    return column


def norm(values: Tensor) -> float:
    """Return the largest absolute value, 0 of none."""
    return float(values.abs().max()) if values.numel() else 0.0


def spread(values: Tensor) -> float:
    """Return the size of a sum whose terms had random signs: the root of the sum of squares, largest over channels."""
    return float(torch.sqrt(per_channel(values).square().sum(1)).max()) if values.numel() else 0.0
