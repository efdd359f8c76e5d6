"""The four primitives in public torch operators: any device, any memory format, traceable by torch.compile.

``x`` and ``dy`` have shape ``(N, C, *)``. The passes over ``x`` run in its own dtype, half types in float32
(`sum_dtype`); so do per-channel tensors, shape ``(C,)``, but for what travels between ranks, which is float64. Sums
are taken of ``x - shift``, where ``shift`` is a mean in that dtype: the difference of close numbers is exact, and what
rounding left is added per channel in float64. So the precision of the variance does not depend on how large the mean
is. In the full types each primitive allocates one tensor of the size of ``x``: memory that is not asked for anew is
not paged in anew.
"""

import torch
from torch import Tensor

from ..compat import cast

_ACCUMULATE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def local_sums(x: Tensor) -> Tensor:
    """Compute ``[sum, sqsum, count]`` of this rank's values per channel, around a shift.

    The shift is the mean of an eighth of the samples. That can be no further than ``sqrt(7) * std`` from the mean of
    all of them, so at most three bits of the variance cancel.

    Returns:
        ``(2C + 1,)``, float64; zeros where ``x`` is empty.
    """
    dims, count = _reduced_dims(x), x.numel() // x.shape[1]
    some = x[: (x.shape[0] + 7) // 8]
    shift = some.sum(dims, dtype=sum_dtype(x)) / max(some.numel() // x.shape[1], 1)
    centred = x - per_channel(shift, x)
    rest, shift = centred.sum(dims).double(), shift.double()
    sum = torch.add(rest, shift, alpha=count)
    sqsum = torch.addcmul(centred.square_().sum(dims).double(), shift, sum + rest)
    return torch.cat([sum, sqsum, sum.new_full((1,), count)])


def normalize(x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Compute ``y = (x - mean) * invstd * weight + bias`` in the dtype and memory format of ``x``."""
    return _affine(x, *forward_line(mean, invstd, weight, bias))


def backward_sums(dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``sum_dy`` and ``sum_dy_xhat`` of this rank per channel, with ``xhat = (x - mean) * invstd``.

    Returns:
        ``(C,)`` and ``(C,)``, float32 or float64; zeros where ``x`` is empty.
    """
    dims = _reduced_dims(x)
    sum_dy = dy.sum(dims, dtype=mean.dtype)
    return sum_dy, (x - per_channel(mean, x)).mul_(dy).sum(dims) * invstd


def input_gradient(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, sums: Tensor, count: Tensor
) -> Tensor:
    """Compute ``dx = weight * invstd * (dy - sum_dy / n - xhat * sum_dy_xhat / n)``.

    ``sums`` is ``[sum_dy, sum_dy_xhat]`` over all ranks, ``(2C,)``, and ``count`` their values per channel n, ``()``;
    both float64.
    """
    scale, slope, constant = backward_plane(mean, invstd, weight, sums, count)
    dx = _affine(cast(x, mean.dtype), slope, constant).addcmul_(dy, per_channel(scale, x))
    return cast(dx, x.dtype)


def forward_line(mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute the slope and constant, ``(C,)``, of ``y = slope * x + constant``.

    The constant has the slope as it was rounded, so that the error of y stays below ``3e-7 * mean/std`` in float32.
    """
    slope = invstd if weight is None else invstd * weight
    return slope, -mean * slope if bias is None else torch.addcmul(cast(bias, mean.dtype), mean, slope, value=-1)


def backward_plane(
    mean: Tensor, invstd: Tensor, weight: Tensor | None, sums: Tensor, count: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute scale, slope and constant, ``(C,)``, of ``dx = scale * dy + slope * x + constant``."""
    scale = invstd if weight is None else invstd * weight
    offset, tilt = ((sums / -count).to(scale.dtype).view(2, -1) * scale).unbind()
    slope = tilt * invstd
    return scale, slope, torch.addcmul(offset, mean, slope, value=-1)


def sum_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which the passes over ``x`` run."""
    return _ACCUMULATE.get(x.dtype, x.dtype)


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Shape per-channel values ``(C,)`` as ``(1, C, 1, …)``."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def _affine(x: Tensor, slope: Tensor, constant: Tensor) -> Tensor:
    """Compute ``slope * x + constant`` in one pass."""
    if torch.compiler.is_compiling() or (slope.dtype == x.dtype and x.stride(1) == 1):  # vectorized over channels
        return cast(torch.addcmul(per_channel(constant, x), x, per_channel(slope, x)), x.dtype)
    zero, one = torch.zeros_like(slope), torch.ones_like(slope)
    # eval mode: one pass over rows; F.batch_norm refuses an eps of 0 before torch 2.13
    return torch.batch_norm(x, slope, constant, zero, one, False, 0.0, 0.0, False)


def _reduced_dims(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]
