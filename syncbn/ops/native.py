"""The four primitives on the CPU from torch's own fused operators: fewer passes than nn.BatchNorm, no compiler.

The backward pass of BatchNorm in eval mode sums ``dy`` and ``dy * (x - mean)`` in one pass; with ``dy = x`` that is
the sum and the squared sum. BatchNorm in eval mode is one multiply-add per value. Dense inputs are seen as *planes*
``(N, C, L)`` or as *rows* ``(rows, C)`` (channels last). Both are cut into more channels of fewer values, which the
first-level cache holds and whose float32 sums stay short.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import backward_plane, forward_line, per_channel, sum_dtype

_products = torch.ops.aten.native_batch_norm_backward.default
_WORTH_CUTTING = 2**19  # values of x: below, a cut costs more than it saves (measured)
_SHORT_PLANE = 128  # values; a plane is not cut shorter (measured)
_MAX_WIDTH = 1024  # channels of rows side by side (measured)
_MAX_LENGTH = 512  # values of a channel added up in float32 one by one, of rows; in planes 16 at a time
_MAX_RATIO = 8  # mean**2 / var up to which plain squares are added up: they lose 3 bits of the variance


class _Layout(NamedTuple):
    """How a dense tensor is seen: ``is_rows`` or planes, ``cuts`` per channel, ``length`` values in each."""

    is_rows: bool
    cuts: int
    length: int


def supports(x: Tensor) -> bool:
    """Whether ``x`` is a plain tensor on the CPU, not empty, dense as planes or rows that can be cut."""
    plain = x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter)
    return plain and _layout(x.shape, x.stride()) is not None


@lru_cache(4096)
def _layout(shape: tuple[int, ...], stride: tuple[int, ...]) -> _Layout | None:
    x = torch.empty(shape, device="meta").as_strided(shape, stride)
    count = x.numel() // shape[1]
    is_rows = stride[1] == 1 and x.movedim(1, -1).is_contiguous()  # of planes of 1 value, which are both, too
    if not 0 < count <= 2**24 or not (is_rows or x.is_contiguous()):  # float32 counts to 2**24
        return None
    width, length, limit = (shape[1], count, _MAX_LENGTH) if is_rows else (1, count // shape[0], 64 * _MAX_LENGTH)
    divisors = _divisors(length)
    cuts = 1
    if x.numel() >= _WORTH_CUTTING:
        fits = [k * width <= _MAX_WIDTH if is_rows else length // k >= _SHORT_PLANE for k in divisors]
        cuts = max((k for k, fit in zip(divisors, fits, strict=True) if fit), default=1)
    if length // cuts > limit:
        cuts = min(k for k in divisors if length // k <= limit)
    return _Layout(is_rows, cuts, length // cuts) if cuts <= 2**12 else None


def _divisors(n: int) -> list[int]:
    small = [k for k in range(1, int(n**0.5) + 1) if n % k == 0]
    return small + [n // k for k in small]


def local_sums(x: Tensor) -> Tensor:
    """Compute ``[sum, sqsum, count]`` of this rank; see `reference.local_sums`.

    Sums are those of x where ``mean**2 / var`` is at most 8 in every channel, else those of ``x - mean``.
    """
    n = x.numel() // x.shape[1]
    sum, sqsum = _sums(x, x)
    if torch.addcmul(sqsum, sum, sum, value=-(1 + 1 / _MAX_RATIO) / n).min().item() < 0:
        return _shifted_sums(x, sum / n)
    return torch.cat([sum, sqsum, sum.new_full((1,), n)]).double()


def _shifted_sums(x: Tensor, shift: Tensor) -> Tensor:
    shift = shift.to(sum_dtype(x))
    centred = x - per_channel(shift, x)
    rest, sqrest = _sums(centred, centred)
    rest, shift, n = rest.double(), shift.double(), x.numel() // x.shape[1]
    sum = torch.add(rest, shift, alpha=n)
    return torch.cat([sum, torch.addcmul(sqrest.double(), shift, sum + rest), sum.new_full((1,), n)])


def normalize(x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Compute ``y = (x - mean) * invstd * weight + bias``; see `reference.normalize`."""
    return _affine(x, *forward_line(mean, invstd, weight, bias))


def backward_sums(dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``sum_dy`` and ``sum_dy_xhat`` of this rank; see `reference.backward_sums`."""
    sum_dy, sum_dy_xmu = _sums(_like(dy, x), x, mean)
    return sum_dy, sum_dy_xmu * invstd


def input_gradient(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, sums: Tensor, count: Tensor
) -> Tensor:
    """Compute ``dx = weight * invstd * (dy - sum_dy / n - xhat * sum_dy_xhat / n)``; see `reference`."""
    scale, slope, constant = backward_plane(mean, invstd, weight, sums, count)
    dx = _affine(x.to(mean.dtype), slope, constant)
    return dx.addcmul_(_like(dy, x), per_channel(scale, x)).to(x.dtype)


def _sums(dy: Tensor, x: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute the sums of ``dy`` and of ``dy * (x - shift)`` per channel."""
    layout = _layout(x.shape, x.stride())
    assert layout is not None
    is_rows, cuts, length = layout
    zero, one = _zero_one(cuts * x.shape[1], sum_dtype(x))
    if cuts > 1 or (is_rows and x.dim() not in (2, 4)):  # else the operator sees the layout by itself
        if is_rows:
            size, stride = (1, len(one), length, 1), (len(one) * length, 1, len(one), len(one))
        else:
            size, stride = (x.shape[0], len(one), length, 1), (len(one) * length, length, 1, 1)
        x, dy = x.as_strided(size, stride), dy.as_strided(size, stride)
    if shift is not None and cuts > 1:
        shift = shift.repeat(cuts) if is_rows else shift.repeat_interleave(cuts)
    shift = zero if shift is None else shift
    _, sum_dy_x, sum_dy = _products(dy, x, None, shift, one, None, None, False, 0.0, [False, True, True])
    if cuts > 1:
        shape, dim = ((cuts, -1), 0) if is_rows else ((-1, cuts), 1)
        sum_dy, sum_dy_x = (t.view(shape).sum(dim) for t in (sum_dy, sum_dy_x))
    return sum_dy, sum_dy_x


def _affine(x: Tensor, slope: Tensor, constant: Tensor) -> Tensor:
    """Compute ``slope * x + constant`` in one pass."""
    if slope.dtype == x.dtype and x.stride(1) == 1:  # vectorized over channels
        return torch.addcmul(per_channel(constant, x), x, per_channel(slope, x))
    zero, one = _zero_one(len(slope), slope.dtype)
    y, _, _ = torch.native_batch_norm(x, slope, constant, zero, one, False, 0.0, 0.0)
    return _like(y, x)  # it does not know rows of 3 dimensions


def _like(dy: Tensor, x: Tensor) -> Tensor:
    """Bring ``dy`` to the strides of ``x``."""
    return dy if dy.stride() == x.stride() else torch.empty_like(x).copy_(dy)


@lru_cache(256)
def _zero_one(num_features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Running statistics that change nothing; nobody writes to them."""
    zero = torch.zeros(num_features, dtype=dtype, device="cpu")
    return zero, torch.ones_like(zero)
