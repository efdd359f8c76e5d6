"""Standardized and normalized weights, as parametrizations of ``torch.nn.utils.parametrize``."""

import torch
from torch import Tensor, nn

from ..ops.layout import SUM_DTYPE


class WeightStandardization(nn.Module):
    """Standardize the weight of a convolution: mean 0 and variance 1 per output channel.

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


class WeightNormalization(nn.Module):
    """Normalize a weight: ``weight = g * v / |v|``, with the norm over all dimensions but ``dim``.

    What ``torch.nn.utils.parametrizations.weight_norm`` computes, in operators that autograd differentiates to any
    order: the second derivatives of torch's own operator by v are wrong in 2.14. Half types are computed in float32.
    Collectives: none. Salimans & Kingma 2016, arXiv 1602.07868, section 2.

    Args:
        dim: That of the output channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        """Compute the weight."""
        wide = v.to(SUM_DTYPE.get(v.dtype, v.dtype))
        return (wide * (g.to(wide.dtype) / self._norm(wide))).to(v.dtype)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Compute ``g = |weight|``, and v, which is the weight."""
        wide = weight.to(SUM_DTYPE.get(weight.dtype, weight.dtype))
        return self._norm(wide).to(weight.dtype), weight

    def _norm(self, v: Tensor) -> Tensor:
        over = [dim for dim in range(v.dim()) if dim != self.dim]
        norm: Tensor = torch.linalg.vector_norm(v, dim=over, keepdim=True)
        return norm

    def extra_repr(self) -> str:
        """Show the dimension."""
        return f"dim={self.dim}"
