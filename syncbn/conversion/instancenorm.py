"""Instance normalization: ``y = (x - mean) / sqrt(var + eps) * weight + bias`` over the positions of one channel.

Group normalization with one group per channel. A map of a single value is its own mean, so it gives the bias; torch
refuses that for a batch of one. Ulyanov et al. 2016.
"""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .groupnorm import groupnorm


def instancenorm(layer: _BatchNorm) -> nn.Module:
    """Make the GroupNorm of one channel per group in the place of ``layer``: same eps, affine, device and dtype."""
    return groupnorm(layer, num_groups=layer.num_features)
