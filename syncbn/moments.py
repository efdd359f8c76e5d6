"""Turn sums that add up across ranks into the statistics of the whole batch.

With n values per channel over all ranks, ``mean = sum / n``, ``var = sqsum / n - mean**2`` and
``invstd = rsqrt(var + eps)`` (Ioffe & Szegedy 2015, algorithm 1). Everything here is float64, so that the
difference of squares loses about ``(mean/std)**2 * 2e-16`` of the variance. Nothing here communicates.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Statistics of the whole batch, float64: ``count`` has shape ``(1,)``, the others ``(C,)``.

    ``var`` is biased (divided by ``count``), as the normalization needs it.
    """

    count: Tensor  # type: ignore[assignment]  # a field here, not tuple.count
    mean: Tensor
    var: Tensor
    invstd: Tensor


def pack(count: int, sum: Tensor, sqsum: Tensor) -> Tensor:
    """Join one rank's statistics into the one buffer that travels, ``[sum, sqsum, count]``.

    Args:
        count: Values per channel on this rank; 0 for an empty rank.
        sum: Per-channel sum, ``(C,)``, float64.
        sqsum: Per-channel sum of squares, ``(C,)``, float64.

    Returns:
        ``(2C + 1,)``, float64: the same size and dtype on every rank, the empty ones too.
    """
    return torch.cat([sum, sqsum, sum.new_full((1,), count)])


def unpack(packed: Tensor, eps: float) -> Moments:
    """Compute the moments from a packed buffer that was summed over all ranks.

    A count of 0 gives mean 0 and variance 0, never NaN.

    Args:
        packed: ``[sum, sqsum, count]``, ``(2C + 1,)``, float64.
        eps: Added to the variance under the root.
    """
    sums, count = packed[:-1], packed[-1:]
    mean, sqmean = (sums / count.clamp(min=1)).chunk(2)
    var = torch.addcmul(sqmean, mean, mean, value=-1).clamp_(min=0)
    return Moments(count, mean, var, (var + eps).rsqrt_())


def update_running_statistics(
    running_mean: Tensor, running_var: Tensor, moments: Moments, momentum: float | Tensor
) -> None:
    """Move the running statistics towards the batch, in place: ``new = (1 - momentum) * old + momentum * batch``.

    ``running_var`` receives the unbiased variance ``var * n / (n - 1)``. A global count of 0 changes nothing.
    No value is read back to the host.

    Args:
        running_mean: Buffer ``(C,)`` of any floating dtype.
        running_var: Buffer ``(C,)`` of any floating dtype.
        moments: Statistics of the whole batch.
        momentum: A number, or a tensor of one element (the cumulative average's ``1 / num_batches_tracked``).
    """
    count = moments.count
    factor = count.clamp(max=1) * momentum  # (1,), 0 where there is no value
    unbiased = moments.var * (count / (count - 1).clamp_(min=1))
    for running, batch in ((running_mean, moments.mean), (running_var, unbiased)):
        running.copy_(torch.lerp(running.double(), batch, factor))
