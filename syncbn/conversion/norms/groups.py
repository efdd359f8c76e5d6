"""Group, layer and instance normalization, made from a BatchNorm layer."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...nn.affine import check_divisor


def groupnorm(layer: _BatchNorm, num_groups: int | None = None, channels_per_group: int | None = None) -> nn.Module:
    """Make a GroupNorm: ``y = (x - mean) / sqrt(var + eps) * weight + bias`` per sample and group of channels.

    No batch enters, so there is nothing to synchronize. Same channels, eps, affine, device and dtype as ``layer``.
    Wu & He 2018, section 3.

    Args:
        layer: The BatchNorm.
        num_groups: Groups of channels; 32 if neither is given.
        channels_per_group: Channels of one group instead, which keeps its size where layers differ in width.

    Raises:
        ValueError: If both are given, or the one given does not divide the number of channels.
    """
    channels = layer.num_features
    if num_groups is not None and channels_per_group is not None:
        both = f"num_groups={num_groups} and channels_per_group={channels_per_group}"
        raise ValueError(f"expected one of num_groups and channels_per_group, got {both}; leave one out, or None")
    divisor, option = (
        (num_groups, "num_groups") if channels_per_group is None else (channels_per_group, "channels_per_group")
    )
    divisor = 32 if divisor is None else divisor
    check_divisor(channels, divisor, option)
    num_groups = divisor if channels_per_group is None else channels // divisor
    if not layer.affine:
        return nn.GroupNorm(num_groups, channels, layer.eps, affine=False)
    device, dtype = layer.weight.device, layer.weight.dtype
    norm = nn.GroupNorm(num_groups, channels, layer.eps, True, device, dtype)
    if layer._parameters["bias"] is None:  # torch has a keyword for it from 2.13 on
        norm.register_parameter("bias", None)
    return norm


def layernorm(layer: _BatchNorm) -> nn.Module:
    """Make the GroupNorm of one group: over channels and positions of one sample.

    Weight and bias stay per channel. Ba et al. 2016; Wu & He 2018, section 3.1.
    """
    return groupnorm(layer, num_groups=1)


def instancenorm(layer: _BatchNorm) -> nn.Module:
    """Make the GroupNorm of one channel per group: over the positions of one channel.

    A map of a single value is its own mean, so it gives the bias; torch refuses that for a batch of one. Ulyanov et
    al. 2016.
    """
    return groupnorm(layer, num_groups=layer.num_features)
