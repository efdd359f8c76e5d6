"""The four primitives in public torch operators: any device, any memory format, traceable by torch.compile.

``x`` and ``dy`` have shape ``(N, C, *)``; per-channel tensors have shape ``(C,)`` and are float64. The passes over
``x`` run in its own dtype, half types in float32. Sums are taken of ``x - shift``, where ``shift`` is a mean in that
dtype: the difference of close numbers is exact, and what the rounding left is added per channel in float64. So the
precision of the variance does not depend on how large the mean is. In the full types each primitive allocates one
tensor of the size of ``x``: memory that is not asked for anew is not paged in anew.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_ACCUMULATE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def local_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``sum`` and ``sqsum`` of this rank's values per channel, around a shift.

    The shift is the mean of an eighth of the samples. That can be no further than ``sqrt(7) * std`` from the mean of
    all of them, so at most three bits of the variance cancel.

    Returns:
        ``(C,)`` and ``(C,)``, float64; zeros where ``x`` is empty.
    """
    dims, count = _reduced_dims(x), x.numel() // x.shape[1]
    some = x[: (x.shape[0] + 7) // 8]
    shift = some.sum(dims, dtype=_sum_dtype(x)) / max(some.numel() // x.shape[1], 1)
    centred = x - _per_channel(shift, x)
    rest, shift = centred.sum(dims).double(), shift.double()
    sum = torch.add(rest, shift, alpha=count)
    return sum, torch.addcmul(centred.square_().sum(dims).double(), shift, sum + rest)


def normalize(x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Compute ``y = (x - mean) * invstd * weight + bias`` in the dtype and memory format of ``x``."""
    scale = invstd if weight is None else invstd * weight
    return _affine(x, mean, scale, torch.zeros_like(scale) if bias is None else bias)


def backward_sums(dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``sum_dy`` and ``sum_dy_xhat`` of this rank per channel, with ``xhat = (x - mean) * invstd``.

    Returns:
        ``(C,)`` and ``(C,)``, float64; zeros where ``x`` is empty.
    """
    dims, shift = _reduced_dims(x), mean.to(_sum_dtype(x))
    sum_dy = dy.sum(dims, dtype=_sum_dtype(x)).double()
    sum_dy_xmu = (x - _per_channel(shift, x)).mul_(dy).sum(dims).double()
    return sum_dy, torch.addcmul(sum_dy_xmu, shift - mean, sum_dy) * invstd


def input_gradient(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    mean_dy: Tensor,
    mean_dy_xhat: Tensor,
) -> Tensor:
    """Compute ``dx = weight * invstd * (dy - mean_dy - xhat * mean_dy_xhat)``.

    ``mean_dy`` and ``mean_dy_xhat`` are the sums over all ranks divided by the global count, ``(C,)``.
    """
    scale = invstd if weight is None else invstd * weight
    dx = _affine(x.to(_sum_dtype(x)), mean, -scale * invstd * mean_dy_xhat, -scale * mean_dy)
    return dx.addcmul_(dy, _per_channel(scale, x)).to(x.dtype)


def _affine(x: Tensor, mean: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Compute ``(x - mean) * scale + offset`` in one pass, as ``x * scale + (offset - mean * scale)``.

    What rounding takes from ``scale`` and ``mean`` is put into the constant, so that the error stays below
    ``3e-7 * mean/std`` in float32.
    """
    scale = scale.to(_sum_dtype(x))
    constant = torch.addcmul(offset, mean, scale, value=-1)
    if torch.compiler.is_compiling() or (scale.dtype == x.dtype and x.stride(1) == 1):  # vectorized over channels
        return torch.addcmul(_per_channel(constant, x), x, _per_channel(scale, x)).to(x.dtype)
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    return F.batch_norm(x, zero, one, scale, constant.to(scale.dtype), False, 0.0, 0.0)  # eval: one pass over rows


def _sum_dtype(x: Tensor) -> torch.dtype:
    return _ACCUMULATE.get(x.dtype, x.dtype)


def _reduced_dims(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Shape per-channel values ``(C,)`` as ``(1, C, 1, …)`` in the dtype that the passes over ``x`` use."""
    return values.to(_sum_dtype(x)).view(1, -1, *[1] * (x.dim() - 2))
