"""The four phases on CUDA from the operators of torch's own nn.SyncBatchNorm, one kernel for each pass over x.

For the statistics it is ``batch_norm_update_stats``, which gives the variance: from the ``1 / sqrt(var + eps)`` in
float32 of ``batch_norm_stats``, one far below eps does not come back. Nothing waits for the device. It has been run on
CPU stand-ins for these operators only, so it is checked on its first use. `reference` says what each phase computes.
"""

import sys
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from . import reference, selfcheck
from .layout import PLAIN, SUM_DTYPE, dense_view, memory_format
from .reference import Running

_DEVICE_TYPE = "cuda"  # tests put stand-ins on another
_passed: dict[torch.device, bool] = {}  # verdicts of the self-check


def kernels_for(x: Tensor, *_: Tensor | None, quietly: bool = True) -> ModuleType | None:
    """Return this module for a plain, dense CUDA tensor of less than 2**31 values; the first starts the self-check."""
    if x.device.type != _DEVICE_TYPE or type(x) not in PLAIN or x.numel() >= 2**31:
        return None
    if dense_view(x.shape, x.stride()) is None or not x.is_contiguous(memory_format=memory_format(x)):
        return None
    this = sys.modules[__name__]
    if x.device not in _passed and not is_capturing():  # the check reads values back
        _passed[x.device] = False  # where warnings are errors, too
        _passed[x.device] = selfcheck.passes(__name__, lambda *_: this, x.device)
    return this if _passed.get(x.device) else None


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured, in which no value can be read back."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def forward_reduce(x: Tensor, num_batches_tracked: Tensor | None = None) -> Tensor:
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    num_features, count = x.shape[1], x.numel() // x.shape[1]
    mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
    zero, one = _zero_one(x.device, mean.dtype)
    packed = torch.add(zero, torch.cat([mean, var, one]), alpha=count)  # float64, as zero
    packed[num_features:-1].addcmul_(packed[:num_features], mean)
    return packed


def forward_apply(
    x: Tensor, summed: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running, eps: float
) -> tuple[Tensor, Tensor]:
    statistics = reference.batch_statistics(summed, running, eps, is_empty=False)
    mean, invstd = _mean_invstd(statistics, x)
    if {p.dtype for p in (weight, bias) if p is not None} != {x.dtype}:
        # the operator takes the dtype of x, or that of the sums, for both
        weight, bias = (None if p is None else p.to(mean.dtype) for p in (weight, bias))
    return torch.batch_norm_elemt(x, weight, bias, mean, invstd, 0.0), statistics  # eps is in invstd


def backward_reduce(
    dy: Tensor, x: Tensor, statistics: Tensor, weight_dtype: torch.dtype | None, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    mean, invstd = _mean_invstd(statistics, x)
    # sum_dy_xhat is the gradient of a weight, of which only the dtype is read
    sum_dy, _, sum_dy_xhat, _ = torch.batch_norm_backward_reduce(
        dy, x, mean, invstd, invstd, input_g=True, weight_g=True, bias_g=False
    )
    grad_weight = None if weight_dtype is None else sum_dy_xhat.to(weight_dtype)
    grad_bias = None if bias_dtype is None else sum_dy.to(bias_dtype)
    return torch.cat([sum_dy, sum_dy_xhat]).double(), grad_weight, grad_bias


def backward_apply(dy: Tensor, x: Tensor, statistics: Tensor, weight: Tensor | None, summed: Tensor) -> Tensor:
    mean, invstd = _mean_invstd(statistics, x)
    mean_dy, mean_dy_xmu = torch.div(summed, statistics[-1], out=mean.new_empty(len(summed))).chunk(2)
    mean_dy_xmu.div_(invstd)
    # the operator's own count is an int32, which more than 2**31 values per channel overflow: it gets 1, and means
    _, one = _zero_one(x.device, torch.int32)
    weight = None if weight is None else weight.to(mean.dtype)
    return torch.batch_norm_backward_elemt(dy, x, mean, invstd, weight, mean_dy, mean_dy_xmu, one)


def _mean_invstd(statistics: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    return statistics[:-1].to(SUM_DTYPE.get(x.dtype, x.dtype)).chunk(2)


@lru_cache(64)
def _zero_one(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A float64 zero and a one of ``dtype``, ``(1,)``; nobody writes to them."""
    return torch.zeros(1, dtype=torch.float64, device=device), torch.ones(1, dtype=dtype, device=device)
