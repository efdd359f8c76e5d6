"""Running statistics averaged over ranks: what plain BatchNorm under data parallelism can know without data."""

import warnings
from typing import TypeVar

from torch import nn

from .buffers import layers_with_statistics, statistics_of, sum_over_ranks, write
from .freeze import is_frozen

M = TypeVar("M", bound=nn.Module)


def average_bn_stats(model: M) -> M:
    """Replace the running statistics of every BatchNorm layer by their mean over the ranks, with equal weights.

    That is what plain BatchNorm under data parallelism can know without another pass over data. The new
    ``running_var`` is the mean of the ranks' variances: unlike the pooled variance of `update_bn_stats` it leaves out
    how the ranks' means differ. Frozen layers keep their statistics: average before you freeze. Collectives: one
    exchange over the world for all layers; without a process group nothing happens.

    Returns:
        ``model`` itself.
    """
    layers = [layer for layer in layers_with_statistics(model).values() if not is_frozen(layer)]
    if not layers:
        warnings.warn("syncbn.average_bn_stats found no BatchNorm layer to average.", stacklevel=2)
        return model
    statistics = [tensor.double() for layer in layers for tensor in statistics_of(layer)]
    *totals, world_size = sum_over_ranks("average_bn_stats", [*statistics, statistics[0].new_ones(1)])
    means = iter([total / world_size.to(total.device) for total in totals])
    for layer in layers:
        write(layer, *(next(means) for _ in statistics_of(layer)))
    return model
