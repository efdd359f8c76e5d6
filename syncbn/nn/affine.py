"""No normalization: ``y = x * weight + bias`` per channel, what is left of BatchNorm without its statistics."""

from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops.layout import per_channel


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
        return scale_and_shift(input, self.weight, self.bias).to(input.dtype)

    def extra_repr(self) -> str:
        """Show the channels."""
        return str(self.num_features)


def scale_and_shift(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Compute ``x * weight + bias`` per channel; a None stands for 1 or 0."""
    y = x if weight is None else x * per_channel(weight, x)
    return y if bias is None else y + per_channel(bias, y)


def tensor_of(layer: nn.Module) -> Tensor:
    """Return a tensor that shows the device and dtype of ``layer``, such as its weight."""
    return next((t for t in chain(layer.parameters(), layer.buffers()) if t.is_floating_point()), torch.empty(0))


def check_divisor(channels: int, number: int, option: str) -> None:
    """Raise a ValueError if ``number``, of groups or of channels in one, does not divide the channels."""
    if type(number) is not int or number < 1 or channels % number:
        choices = [n for n in range(1, channels + 1) if channels % n == 0]
        raise ValueError(f"{option}={number!r} does not divide its {channels} channels; choose one of {choices}")


def check_eps(eps: float) -> None:
    """Raise a ValueError unless ``eps`` is a finite number above 0."""
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < torch.inf:
        raise ValueError(f"eps={eps!r}: expected a finite number above 0")


def check_flag(value: bool, option: str) -> None:
    """Raise a ValueError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{option}={value!r}: expected True or False")


class ChannelBias(ChannelAffine):
    """Shift each channel: ``y = x + bias``, what is left of BatchNorm where a normalized weight has the scale.

    Shapes, arguments and errors are those of `ChannelAffine`; a layer without a bias gets one.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__(layer)
        like = tensor_of(layer)
        bias = torch.zeros(layer.num_features, device=like.device, dtype=like.dtype)
        self.weight, self.bias = None, nn.Parameter(bias) if self.bias is None else self.bias
