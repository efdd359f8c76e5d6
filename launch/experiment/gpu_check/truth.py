"""What the four primitives must give, in float64 and in the formulas of the paper: nothing of syncbn is used.

Ioffe & Szegedy 2015, algorithm 1 and the gradients below it. Inputs are seen as ``(C, n)``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def per_channel(x: Tensor) -> Tensor:
    """Return the values as ``(C, n)``, float64, on the CPU."""
    return x.detach().cpu().double().movedim(1, 0).flatten(1)


def mean_var(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean and biased variance per channel, by two passes."""
    values = per_channel(x)
    mean = values.mean(1)
    return mean, (values - mean[:, None]).square().mean(1)


def normalized(x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Compute ``y``, ``(C, n)``."""
    y = (per_channel(x) - _column(mean)) * _column(invstd)
    y = y if weight is None else y * _column(weight)
    return y if bias is None else y + _column(bias)


def gradient_sums(dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``sum_dy`` and ``sum_dy_xhat``, ``(C,)``."""
    xhat = (per_channel(x) - _column(mean)) * _column(invstd)
    return per_channel(dy).sum(1), (per_channel(dy) * xhat).sum(1)


def input_gradient(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, sums: Tensor, count: int
) -> Tensor:
    """Compute ``dx``, ``(C, n)``, for sums over a batch of ``count`` values per channel."""
    xhat = (per_channel(x) - _column(mean)) * _column(invstd)
    mean_dy, mean_dy_xhat = (sums.cpu().double() / count).view(2, -1, 1)
    dx: Tensor = (per_channel(dy) - mean_dy - xhat * mean_dy_xhat) * _column(invstd)
    return dx if weight is None else dx * _column(weight)


def _column(values: Tensor) -> Tensor:
    column: Tensor = values.detach().cpu().double()[:, None]
    return column


def norm(values: Tensor) -> float:
    """Return the largest absolute value, 0 of none."""
    return float(values.abs().max()) if values.numel() else 0.0


def spread(values: Tensor) -> float:
    """Return the size of a sum whose terms had random signs: the root of the sum of squares, largest over channels."""
    return float(torch.sqrt(per_channel(values).square().sum(1)).max()) if values.numel() else 0.0
