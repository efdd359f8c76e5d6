"""Filter response normalization: without a mean, without the batch, and with the activation inside."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops.checks import check_input
from ..ops.layout import SUM_DTYPE, per_channel
from .affine import ChannelAffine, check_eps, check_flag, tensor_of


class FilterResponseNorm(ChannelAffine):
    """Divide each channel of a sample by its root mean square, then take the larger of the result and ``tau``.

    ``y = x / sqrt(mean(x**2) + eps) * weight + bias`` with the mean over the positions of one sample and channel,
    and ``z = max(y, tau)``, the thresholded linear unit (TLU), which replaces the ReLU behind the norm. ``tau``,
    ``(C,)``, starts at 0 and learns. Without TLU z is y, and the activation behind stays.

    A map of one position, as of an input ``(N, C)``, is ``x / sqrt(x**2 + eps)``: little more than its sign, so the
    paper learns eps there, as ``|eps|``. No mean is subtracted, so a network wants its learning rate warmed up.

    Shapes: input and output ``(N, C, *)``, the output in the input's dtype; half types are computed in float32.
    Collectives: none. State_dict: ``weight, bias, tau``, and ``eps`` if it learns.

    Source: Singh & Krishnan 2020 (arXiv 1911.09737), section 3; equal to timm's FilterResponseNormTlu2d at equal eps.

    Args:
        layer: The BatchNorm whose channels, weight and bias it takes.
        eps: Added to the mean square; where it learns, its start (1e-4 in the paper).
        learn_eps: Whether eps is a parameter, one for all channels.

    Raises:
        ValueError: Unless ``eps`` is above 0; in forward, for an input that does not fit the layer.
    """

    ACTIVATION, WITHOUT = "TLU", "without TLU"  # for `plan`
    tau: nn.Parameter | None
    eps: float | nn.Parameter

    def __init__(self, layer: _BatchNorm, eps: float = 1e-6, learn_eps: bool = False) -> None:
        super().__init__(layer)
        check_eps(eps)
        check_flag(learn_eps, "learn_eps")
        like = tensor_of(layer)
        self.tau = nn.Parameter(like.new_zeros(self.num_features))
        self.eps = nn.Parameter(like.new_tensor(eps)) if learn_eps else eps

    def remove_activation(self) -> None:
        """Take the TLU away, for a place without an activation to replace."""
        self.tau = None

    def forward(self, input: Tensor) -> Tensor:
        """Normalize and activate ``input``; see the class."""
        check_input(input, self.weight, None, None, self.num_features)
        x = input.to(SUM_DTYPE.get(input.dtype, input.dtype))
        eps = self.eps.abs() if isinstance(self.eps, Tensor) else self.eps
        square = x.square()
        if x.dim() > 2:
            square = square.mean(tuple(range(2, x.dim())), keepdim=True)
        y = super().forward(x * (square + eps).rsqrt())
        if self.tau is not None:
            y = torch.maximum(y, per_channel(self.tau, y))
        return y.to(input.dtype)

    def extra_repr(self) -> str:
        """Show the channels, eps, and what is missing or learned."""
        eps = "learned" if isinstance(self.eps, Tensor) else self.eps
        return f"{self.num_features}, eps={eps}{'' if self.tau is not None else ', without TLU'}"
