"""Turn sums that add up across ranks into the statistics of the whole batch.

With n values per channel over all ranks, ``mean = sum / n``, ``var = sqsum / n - mean**2`` and
``invstd = rsqrt(var + eps)`` (Ioffe & Szegedy 2015, algorithm 1). Everything here is float64, so that the
difference of squares loses about ``(mean/std)**2 * 2e-16`` of the variance. Nothing here communicates.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Statistics of the whole batch, float64: ``count`` has shape ``()``, the others ``(C,)``.

    ``sqdev`` is the sum of squared deviations from the mean, ``count`` times the biased variance.
    """

    count: Tensor  # type: ignore[assignment]  # a field here, not tuple.count
    mean: Tensor
    sqdev: Tensor
    invstd: Tensor


def unpack(packed: Tensor, eps: float, may_be_empty: bool = True) -> Moments:
    """Compute the moments from a packed buffer that was summed over all ranks.

    A count of 0 gives mean 0 and variance 0, never NaN.

    Args:
        packed: ``[sum, sqsum, count]``, ``(2C + 1,)``, float64, as `kernels` makes it.
        eps: Added to the variance under the root.
        may_be_empty: Whether the global count may be 0.
    """
    sum, sqsum = packed[:-1].chunk(2)
    count = packed[-1]
    divisor = count.clamp(min=1) if may_be_empty else count
    mean = sum / divisor
    sqdev = torch.addcmul(sqsum, sum, mean, value=-1).clamp_(min=0)
    return Moments(count, mean, sqdev, (sqdev / divisor).add_(eps).rsqrt_())


class Batch(NamedTuple):
    """What the passes over the batch need: ``count`` of shape ``()`` in float64, the others ``(C,)``."""

    count: Tensor  # type: ignore[assignment]  # a field here, not tuple.count
    mean: Tensor
    invstd: Tensor


def advance(
    packed: Tensor,
    eps: float,
    dtype: torch.dtype,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float | Tensor = 0.0,
    may_be_empty: bool = True,
) -> Batch:
    """Unpack the moments, and move the running statistics towards them if there are any.

    Args:
        packed: See `unpack`.
        eps: See `unpack`.
        dtype: Of the result.
        running_mean: See `update_running_statistics`.
        running_var: See `update_running_statistics`.
        momentum: See `update_running_statistics`.
        may_be_empty: Whether the global count may be 0.
    """
    moments = unpack(packed, eps, may_be_empty)
    if running_mean is not None and running_var is not None:
        update_running_statistics(running_mean, running_var, moments, momentum, may_be_empty)
    return Batch(moments.count, moments.mean.to(dtype), moments.invstd.to(dtype))


def update_running_statistics(
    running_mean: Tensor, running_var: Tensor, moments: Moments, momentum: float | Tensor, may_be_empty: bool = True
) -> None:
    """Move the running statistics towards the batch, in place: ``new = (1 - momentum) * old + momentum * batch``.

    ``running_var`` receives the unbiased variance ``sqdev / (n - 1)``. No value is read back to the host.

    Args:
        running_mean: Buffer ``(C,)`` of any floating dtype.
        running_var: Buffer ``(C,)`` of any floating dtype.
        moments: Statistics of the whole batch.
        momentum: A number, or a tensor of one element (the cumulative average's ``1 / num_batches_tracked``).
        may_be_empty: Whether the global count may be 0, which changes nothing.
    """
    count, mean, sqdev, _ = moments
    for running, batch in ((running_mean, mean), (running_var, sqdev / (count - 1))):
        step = batch - running  # float64, and so is the sum: all ranks round alike, whatever path each takes
        if may_be_empty:
            step = torch.where(count > 0, step, 0)
        if isinstance(momentum, Tensor):
            running.add_(step * momentum)
        else:
            running.add_(step, alpha=momentum)
