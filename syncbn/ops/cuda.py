"""The four primitives on CUDA from the operators of torch's own nn.SyncBatchNorm, one kernel for each pass over x.

For the statistics it is ``batch_norm_update_stats``, which gives the variance: from the ``1 / sqrt(var + eps)`` in
float32 of ``batch_norm_stats``, one far below eps does not come back. Nothing waits for the device, no shape depends
on values. This file has been run on CPU stand-ins for these operators only, so it is checked on its first use.
"""

import sys
from functools import lru_cache

import torch
from torch import Tensor

from . import selfcheck
from .reference import sum_dtype

_DEVICE_TYPE = "cuda"  # tests put stand-ins on another
_passed: dict[torch.device, bool] = {}  # verdicts of the self-check


def supports(x: Tensor) -> bool:
    """Whether ``x`` is a plain CUDA tensor, not empty, contiguous or channels last, of less than 2**31 values.

    The first such ``x`` on a device starts the self-check (`selfcheck.passes`), unless a CUDA graph is captured.
    """
    if x.device.type != _DEVICE_TYPE or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    if not (0 < x.numel() < 2**31 and _is_dense(x)):
        return False
    if x.device not in _passed:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return False  # the check reads values back
        _passed[x.device] = False  # where warnings are errors, too
        _passed[x.device] = selfcheck.passes(sys.modules[__name__], x.device)
    return _passed[x.device]


def local_sums(x: Tensor) -> Tensor:
    """Compute ``[sum, sqsum, count]`` of this rank; see `reference.local_sums`."""
    num_features, count = x.shape[1], x.numel() // x.shape[1]
    mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
    zero, one = _zero_one(x.device, mean.dtype)
    packed = torch.add(zero, torch.cat([mean, var, one]), alpha=count)  # float64, as zero
    packed[num_features:-1].addcmul_(packed[:num_features], mean)
    return packed


def normalize(x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Compute ``y = (x - mean) * invstd * weight + bias``; see `reference.normalize`."""
    dtypes = {p.dtype for p in (weight, bias) if p is not None}
    if dtypes != {x.dtype}:  # the operator takes the dtype of x, or that of the sums, for both
        weight, bias = _to(weight, sum_dtype(x)), _to(bias, sum_dtype(x))
    mean, invstd = mean.to(sum_dtype(x)), invstd.to(sum_dtype(x))
    return torch.batch_norm_elemt(x, weight, bias, mean, invstd, 0.0)  # eps is in invstd


def backward_sums(dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``sum_dy`` and ``sum_dy_xhat`` of this rank, float32 but for float64 inputs.

    See `reference.backward_sums`.
    """
    mean, invstd = mean.to(sum_dtype(x)), invstd.to(sum_dtype(x))
    # sum_dy_xhat is the gradient of a weight, of which only the dtype is read
    sum_dy, _, sum_dy_xhat, _ = torch.batch_norm_backward_reduce(
        _like(dy, x), x, mean, invstd, invstd, input_g=True, weight_g=True, bias_g=False
    )
    return sum_dy, sum_dy_xhat


def input_gradient(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, sums: Tensor, count: Tensor
) -> Tensor:
    """Compute ``dx = weight * invstd * (dy - sum_dy / n - xhat * sum_dy_xhat / n)``; see `reference.input_gradient`.

    The operator's own count is an int32, which more than 2**31 values per channel overflow: it gets 1, and means.
    """
    dtype = sum_dtype(x)
    mean, invstd = mean.to(dtype), invstd.to(dtype)
    mean_dy, mean_dy_xmu = torch.div(sums, count, out=sums.new_empty(len(sums), dtype=dtype)).chunk(2)
    mean_dy_xmu.div_(invstd)
    _, one = _zero_one(x.device, torch.int32)
    weight = _to(weight, dtype)
    return torch.batch_norm_backward_elemt(_like(dy, x), x, mean, invstd, weight, mean_dy, mean_dy_xmu, one)


def _is_dense(x: Tensor) -> bool:
    by_dims = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.is_contiguous() or (x.dim() in by_dims and x.is_contiguous(memory_format=by_dims[x.dim()]))


def _like(dy: Tensor, x: Tensor) -> Tensor:
    """Bring ``dy`` to the strides of ``x``."""
    return dy if dy.stride() == x.stride() else torch.empty_like(x).copy_(dy)


def _to(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if parameter is None else parameter.to(dtype)


@lru_cache(64)
def _zero_one(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A float64 zero and a one of ``dtype``, ``(1,)``; nobody writes to them."""
    return torch.zeros(1, dtype=torch.float64, device=device), torch.ones(1, dtype=dtype, device=device)
