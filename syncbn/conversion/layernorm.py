"""Layer normalization: ``y = (x - mean) / sqrt(var + eps) * weight + bias`` over channels and positions of one sample.

Group normalization with one group; weight and bias stay per channel. Ba et al. 2016; Wu & He 2018, section 3.1.
"""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .groupnorm import groupnorm


def layernorm(layer: _BatchNorm) -> nn.Module:
    """Make the GroupNorm of one group that takes the place of ``layer``: same channels, eps, affine, device, dtype."""
    return groupnorm(layer, num_groups=1)
