"""The four phases in public torch operators: any device, any memory format, traceable by torch.compile.

``x`` and ``dy`` have shape ``(N, C, *)``. The passes over ``x`` run in its own dtype, half types in float32
(`layout.SUM_DTYPE`); per-channel arithmetic, shape ``(C,)``, and what travels between ranks is float64. Sums are taken
of ``x - shift``, where ``shift`` is a mean as the passes round it: the difference of close numbers is exact, and what
rounding left is added per channel in float64, so that precision does not depend on how large the mean is.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .layout import SUM_DTYPE

_WIDE = torch.float64
# Convert only where the dtype differs: else torch 2.11 makes the gradients of compiled Functions zero.


class Running(NamedTuple):
    """The running statistics of a layer, ``(C,)`` or None, and how they move.

    A ``momentum`` of None is the average of all batches, which ``num_batches_tracked``, ``()``, has counted.
    """

    mean: Tensor | None = None
    var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    momentum: float | Tensor | None = 0.0


def forward_reduce(x: Tensor, num_batches_tracked: Tensor | None = None) -> Tensor:
    """Compute ``packed = [sum, sqsum, count]`` of this rank's values per channel; count the batch.

    ``(2C + 1,)``, float64. The sums are taken around the mean of an eighth of the samples, which is no further than
    ``sqrt(7) * std`` from the mean of all of them, so at most three bits of the variance cancel. In a graph of
    torch.compile it is the variance of ``x - first``, which the compiler computes in one pass, whatever the first is.
    """
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if torch.compiler.is_compiling():
        return _reduce_in_graph(x)
    dims, count = [0, *range(2, x.dim())], x.numel() // x.shape[1]
    some = x[: (x.shape[0] + 7) // 8]
    shift = some.sum(dims, dtype=SUM_DTYPE.get(x.dtype, x.dtype)) / max(some.numel() // x.shape[1], 1)
    centred = x - shift.view(1, -1, *[1] * (x.dim() - 2))
    rest = centred.sum(dims)
    wide = torch.stack([shift, rest, centred.square_().sum(dims)])
    if wide.dtype != _WIDE:
        wide = wide.to(_WIDE)
    shift, rest, sqrest = wide.unbind()
    sum = torch.add(rest, shift, alpha=count)
    return torch.cat([sum, torch.addcmul(sqrest, shift, sum + rest), sum.new_full((1,), count)])


def _reduce_in_graph(x: Tensor) -> Tensor:
    """Compute ``packed`` of `forward_reduce` from mean and variance of ``x - first``, ``first`` of each channel."""
    dims, count = [0, *range(2, x.dim())], x.numel() // x.shape[1]
    if count == 0:
        return x.new_zeros(2 * x.shape[1] + 1, dtype=_WIDE)
    dtype = SUM_DTYPE.get(x.dtype, x.dtype)
    x = x if x.dtype == dtype else x.to(dtype)
    first = x[:1]
    for dim in dims[1:]:
        first = first.narrow(dim, 0, 1)
    var, mean = torch.var_mean(x - first, dims, correction=0)
    shift = first.reshape(-1)
    if dtype != _WIDE:
        var, mean, shift = var.to(_WIDE), mean.to(_WIDE), shift.to(_WIDE)
    mean = mean + shift
    return torch.cat([mean * count, (var + mean.square()) * count, mean.new_full((1,), count)])


def forward_apply(
    x: Tensor, summed: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute ``y = (x - mean) * invstd * weight + bias``, and move the running statistics if there are any.

    ``summed`` is ``packed`` of `forward_reduce`, all ranks added up. Returns y, in the dtype and memory format of
    ``x``, and the statistics ``[mean, invstd, count]`` of the whole batch, ``(2C + 1,)``, float64.
    """
    statistics = batch_statistics(summed, running, eps, is_empty=x.numel() == 0)
    mean, invstd = statistics[: 2 * x.shape[1]].chunk(2)
    slope = invstd if weight is None else invstd * weight
    dtype = SUM_DTYPE.get(x.dtype, x.dtype)
    if dtype != _WIDE:
        slope = slope.to(dtype)
    # With the slope as it was rounded, the error of y stays below 3e-7 * mean/std in float32.
    constant = mean * -slope if bias is None else bias - mean * slope
    return _affine(x, slope, constant if dtype == _WIDE else constant.to(dtype)), statistics


def batch_statistics(summed: Tensor, running: Running, eps: float, is_empty: bool) -> Tensor:
    """Compute ``[mean, invstd, count]``; move the running statistics: ``new = (1 - momentum) * old + momentum * b``.

    With n values per channel over all ranks, ``mean = sum / n``, ``var = sqsum / n - mean**2`` and ``invstd =
    rsqrt(var + eps)`` (Ioffe & Szegedy 2015, algorithm 1), in float64: cancellation costs at most
    ``(mean/std)**2 * 2e-16`` of the variance. ``running.var`` moves towards ``var * n / (n - 1)``. ``is_empty``: this
    rank has no values, so n may be 0; then mean and variance are 0, and nothing moves.
    """
    count, momentum = summed[-1], running.momentum
    mean, sqdev = moments(summed, is_empty)
    if running.mean is not None and running.var is not None:
        if momentum is None and running.num_batches_tracked is not None:
            momentum = 1.0 / running.num_batches_tracked.double()
        for old, batch in ((running.mean, mean), (running.var, sqdev / (count - 1))):
            step = batch - old  # float64: all ranks round alike, whatever back end each takes
            if is_empty:
                step = torch.where(count > 0, step, 0)
            if isinstance(momentum, Tensor):
                old.add_(step * momentum)
            else:
                old.add_(step, alpha=momentum or 0.0)
    invstd = (sqdev / (count.clamp(min=1) if is_empty else count)).add_(eps).rsqrt_()
    # in a graph the count as often as there are channels: one kernel less
    return torch.cat([mean, invstd, count.expand(len(mean) if torch.compiler.is_compiling() else 1)])


def moments(summed: Tensor, is_empty: bool = True) -> tuple[Tensor, Tensor]:
    """Compute the mean and the sum of squared deviations from it, ``(C,)``, of ``[sum, sqsum, count]``."""
    sum, sqsum = summed[:-1].chunk(2)
    mean = sum / (summed[-1].clamp(min=1) if is_empty else summed[-1])
    return mean, torch.addcmul(sqsum, sum, mean, value=-1).clamp(min=0)


def backward_reduce(
    dy: Tensor, x: Tensor, statistics: Tensor, weight_dtype: torch.dtype | None, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute ``packed = [sum_dy, sum_dy_xhat]`` of this rank per channel, with ``xhat = (x - mean) * invstd``.

    Returns ``packed``, ``(2C,)``, float64, zeros where ``x`` is empty; and the gradients of weight and bias, ``(C,)``,
    of this rank, in the dtypes given, None for None. Other back ends take ``dy`` as `autograd.alike` returns it.
    """
    dims, dtype = [0, *range(2, x.dim())], SUM_DTYPE.get(x.dtype, x.dtype)
    mean, invstd = statistics[: 2 * x.shape[1]].chunk(2)
    shift = mean if dtype == _WIDE else mean.to(dtype)
    sum_dy = dy.sum(dims, dtype=dtype)
    sum_dy_xmu = (x - shift.view(1, -1, *[1] * (x.dim() - 2))).mul_(dy).sum(dims)
    if dtype != _WIDE and torch.compiler.is_compiling():  # each within the kernel that makes it
        sum_dy, sum_dy_xmu = sum_dy.to(_WIDE), sum_dy_xmu.to(_WIDE)
    elif dtype != _WIDE:
        sum_dy, sum_dy_xmu = torch.stack([sum_dy, sum_dy_xmu]).to(_WIDE).unbind()
    sum_dy_xhat = torch.addcmul(sum_dy_xmu, shift - mean, sum_dy) * invstd
    grad_weight = None if weight_dtype is None else sum_dy_xhat.to(weight_dtype)
    grad_bias = None if bias_dtype is None else sum_dy.to(bias_dtype)
    return torch.cat([sum_dy, sum_dy_xhat]), grad_weight, grad_bias


def backward_apply(dy: Tensor, x: Tensor, statistics: Tensor, weight: Tensor | None, summed: Tensor) -> Tensor:
    """Compute ``dx = weight * invstd * (dy - sum_dy / n - xhat * sum_dy_xhat / n)``.

    ``summed`` is ``packed`` of `backward_reduce`, all ranks added up, and n the count in ``statistics``.
    """
    mean, invstd = statistics[: 2 * x.shape[1]].chunk(2)
    scale = invstd if weight is None else invstd * weight
    offset, tilt = ((summed / -statistics[-1]).view(2, -1) * scale).unbind()
    dtype = SUM_DTYPE.get(x.dtype, x.dtype)
    slope = tilt * invstd
    if dtype != _WIDE and torch.compiler.is_compiling():
        scale, slope = scale.to(dtype), slope.to(dtype)
    elif dtype != _WIDE:
        scale, slope = torch.stack([scale, slope]).to(dtype).unbind()
    constant = offset - mean * slope
    if dtype != _WIDE:
        constant = constant.to(dtype)
    dx = _affine(x if x.dtype == dtype else x.to(dtype), slope, constant)
    dx = dx.addcmul_(dy, scale.view(1, -1, *[1] * (x.dim() - 2)))
    return dx if x.dtype == dtype else dx.to(x.dtype)


def _affine(x: Tensor, slope: Tensor, constant: Tensor) -> Tensor:
    """Compute ``slope * x + constant`` in one pass."""
    if torch.compiler.is_compiling() or (slope.dtype == x.dtype and x.stride(1) == 1):  # vectorized over channels
        shape = (1, -1, *[1] * (x.dim() - 2))
        y = torch.addcmul(constant.view(shape), x, slope.view(shape))
        return y if y.dtype == x.dtype else y.to(x.dtype)
    zero, one = torch.zeros_like(slope), torch.ones_like(slope)
    # eval mode: one pass over rows; F.batch_norm refuses an eps of 0 before torch 2.13
    y = torch.batch_norm(x, slope, constant, zero, one, False, 0.0, 0.0, False)
    if x.stride(1) == 1 and y.stride() != x.stride():  # it does not know channels last of 3 dimensions
        return torch.empty_like(x).copy_(y)
    return y
