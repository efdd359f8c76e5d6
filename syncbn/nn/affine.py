"""No normalization: ``y = x * weight + bias`` per channel, what is left of BatchNorm without its statistics."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class ChannelAffine(nn.Module):
    """Scale and shift each channel: ``y = x * weight + bias``, the identity for a layer without weight and bias.

    Shapes: input and output ``(N, C, *)``, the output in the input's dtype.

    Args:
        layer: The BatchNorm whose channels, weight and bias it takes.

    Raises:
        ValueError: In forward, for an input of other channels.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__()
        self.num_features = layer.num_features
        self.register_parameter("weight", layer.weight)
        self.register_parameter("bias", layer.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Scale and shift ``input``; see the class."""
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ValueError(f"expected an input (N, {self.num_features}, *), got shape {tuple(input.shape)}.")
        y = input
        per_channel = (-1, *[1] * (input.dim() - 2))
        if self.weight is not None:
            y = y * self.weight.view(per_channel)
        if self.bias is not None:
            y = y + self.bias.view(per_channel)
        return y.to(input.dtype)

    def extra_repr(self) -> str:
        """Show the channels."""
        return str(self.num_features)


class ChannelBias(ChannelAffine):
    """Shift each channel: ``y = x + bias``, what is left of BatchNorm where a normalized weight has the scale.

    Shapes, arguments and errors are those of `ChannelAffine`; a layer without a bias gets one.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__(layer)
        like = layer.running_mean if layer.weight is None else layer.weight
        like = torch.empty(0) if like is None else like
        bias = torch.zeros(layer.num_features, device=like.device, dtype=like.dtype)
        self.weight, self.bias = None, nn.Parameter(bias) if self.bias is None else self.bias
