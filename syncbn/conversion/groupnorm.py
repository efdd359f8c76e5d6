"""Group normalization: ``y = (x - mean) / sqrt(var + eps) * weight + bias`` per sample and group of channels.

No batch enters, so there is nothing to synchronize. Wu & He 2018, section 3.
"""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def groupnorm(layer: _BatchNorm, num_groups: int = 32) -> nn.Module:
    """Make the GroupNorm that takes the place of ``layer``: same channels, eps, affine, device and dtype.

    Raises:
        ValueError: If ``num_groups`` does not divide the number of channels.
    """
    channels = layer.num_features
    if num_groups < 1 or channels % num_groups:
        choices = [n for n in range(1, channels + 1) if channels % n == 0]
        raise ValueError(f"num_groups={num_groups} does not divide its {channels} channels; choose one of {choices}")
    if not layer.affine:
        return nn.GroupNorm(num_groups, channels, layer.eps, affine=False)
    device, dtype = layer.weight.device, layer.weight.dtype
    norm = nn.GroupNorm(num_groups, channels, layer.eps, True, device, dtype)
    if layer._parameters["bias"] is None:  # torch has a keyword for it from 2.13 on
        norm.register_parameter("bias", None)
    return norm
