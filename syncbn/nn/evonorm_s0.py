"""EvoNorm-S0: a norm and an activation in one, without the batch."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops.checks import check_input
from ..ops.layout import SUM_DTYPE, per_channel
from .affine import ChannelAffine, check_divisor, check_eps, tensor_of


class EvoNormS0(ChannelAffine):
    """Gate each value by a sigmoid, and divide by the standard deviation of its sample and group of channels.

    ``y = x * sigmoid(v * x) / sqrt(var + eps) * weight + bias`` with the biased variance over channels and positions
    of a group. ``v``, ``(C,)``, starts at 1 and learns. It replaces the norm and the activation behind it. Without
    ``v`` nothing is normalized: ``y = x * weight + bias``, as for the norm that no activation follows.

    Shapes: input and output ``(N, C, *)``, the output in the input's dtype; half types are computed in float32.
    Collectives: none. State_dict: ``weight, bias, v``.

    Source: Liu et al. 2020 (arXiv 2004.02967), table 1; equal to timm's EvoNorm2dS0.

    Args:
        layer: The BatchNorm whose channels, weight and bias it takes.
        num_groups: Groups of channels.
        eps: Added to the variance.

    Raises:
        ValueError: If ``num_groups`` does not divide the channels, or ``eps`` is not above 0; in forward, for an input
            that does not fit.
    """

    ACTIVATION, WITHOUT = "its own activation", "weight and bias alone"  # for `plan`
    v: nn.Parameter | None

    def __init__(self, layer: _BatchNorm, num_groups: int = 32, eps: float = 1e-5) -> None:
        super().__init__(layer)
        check_eps(eps)
        check_divisor(self.num_features, num_groups, "num_groups")
        self.num_groups, self.eps = num_groups, eps
        self.v = nn.Parameter(tensor_of(layer).new_ones(self.num_features))

    def remove_activation(self) -> None:
        """Take ``v`` away, for a place without an activation to replace."""
        self.v = None

    def forward(self, input: Tensor) -> Tensor:
        """Normalize and activate ``input``; see the class."""
        check_input(input, self.weight, None, None, self.num_features)
        y = x = input.to(SUM_DTYPE.get(input.dtype, input.dtype))
        if self.v is not None:
            sizes = (self.num_groups, self.num_features // self.num_groups)
            gated = x * (x * per_channel(self.v, x)).sigmoid()
            std = (var_of_positions(torch.unflatten(x, 1, sizes)) + self.eps).sqrt()
            y = (torch.unflatten(gated, 1, sizes) / std).flatten(1, 2)
        return super().forward(y).to(input.dtype)

    def extra_repr(self) -> str:
        """Show channels, groups, eps, and whether the activation is missing."""
        shown = f"{self.num_features}, num_groups={self.num_groups}, eps={self.eps}"
        return shown if self.v is not None else f"{shown}, {self.WITHOUT}"


def var_of_positions(x: Tensor) -> Tensor:
    """Compute the biased variance over all dimensions from the third on, which stay; 0 if there are none."""
    dims = tuple(range(2, x.dim()))
    return (x - x.mean(dims, keepdim=True)).square().mean(dims, keepdim=True) if dims else torch.zeros_like(x)
