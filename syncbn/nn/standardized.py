"""Weight standardization: the weight of a convolution with mean 0 and variance 1 per output channel."""

import torch
from torch import Tensor, nn

from ..ops.layout import SUM_DTYPE


class WeightStandardization(nn.Module):
    """Standardize the weight of a convolution, as a parametrization of ``torch.nn.utils.parametrize``.

    ``W' = (W - mean) / sqrt(var + eps)`` with mean and biased variance of each output channel, over its input channels
    and the positions of the kernel: what timm's ``StdConv2d`` computes. Half types are computed in float32. Autograd
    differentiates it to any order. Collectives: none. Qiao et al. 2019, arXiv 1903.10520, section 3, whose code takes
    the unbiased deviation, and adds 1e-5 to it.

    Shapes: weight ``(out, in / groups, *)``; of a transposed convolution ``(in, out / groups, *)``.

    Args:
        transposed_groups: Groups of a transposed convolution; None for any other.
        eps: Added to the variance under the root.
    """

    def __init__(self, transposed_groups: int | None = None, eps: float = 1e-6) -> None:
        super().__init__()
        self.transposed_groups, self.eps = transposed_groups, eps

    def forward(self, weight: Tensor) -> Tensor:
        """Standardize ``weight``; see the class."""
        wide, dims = weight.to(SUM_DTYPE.get(weight.dtype, weight.dtype)), range(1, weight.dim())
        if self.transposed_groups is not None:
            wide = wide.view(self.transposed_groups, -1, *wide.shape[1:])  # (groups, in / groups, out / groups, *)
            dims = range(1, wide.dim())
        over = [dim for dim in dims if self.transposed_groups is None or dim != 2]
        var, mean = torch.var_mean(wide, over, correction=0, keepdim=True)
        standardized = (wide - mean) * torch.rsqrt(var + self.eps)
        return standardized.reshape(weight.shape).to(weight.dtype)

    def extra_repr(self) -> str:
        """Show the constructor's arguments that matter."""
        groups = "" if self.transposed_groups is None else f"transposed_groups={self.transposed_groups}, "
        return f"{groups}eps={self.eps}"
