"""Normalize without an exchange, by ``F.batch_norm`` wherever it can: in eval mode, and in one process."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops.autograd import train_step
from .ops.layout import SUM_DTYPE
from .ops.reference import Running
from .plain.mask import check_mask, weights_of
from .plain.step import plain_step
from .private import running_backward


def evaluate(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Normalize by running statistics; without any by those of the batch of this rank alone, as nn.BatchNorm does."""
    padding = None
    if mask is not None:
        check_mask(mask, x)
        if mean is None:
            return plain_step(x, weight, bias, Running(), eps, None, "eval", mask=mask)
        padding = weights_of(mask, x).padding
        x = torch.where(padding, 0, x)  # NaN there would be one in the gradient of the weight
    if not _is_torch_mix(x, mean, var, weight, bias):
        dtype = SUM_DTYPE.get(x.dtype, x.dtype)
        mean, var, weight, bias = (None if t is None else t.to(dtype) for t in (mean, var, weight, bias))
    y = F.batch_norm(x, mean, var, weight, bias, mean is None, 0.0, eps)
    return y if padding is None else torch.where(padding, 0, y)


def one_process(x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running, eps: float) -> Tensor:
    """Do a training step where there is nothing to exchange, by ``F.batch_norm``; nothing is read back to the host."""
    if not _is_torch_mix(x, weight, bias, running.mean, running.var):
        return train_step(x, weight, bias, running, eps, None, "SyncBatchNorm")
    running_mean, running_var, num_batches_tracked, momentum = running
    if not torch.compiler.is_compiling() and running_backward() != -1:
        momentum = 0.0  # a recomputation: the first pass has moved them
    elif num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if momentum is None:
        momentum = 0.0 if num_batches_tracked is None else 1.0 / num_batches_tracked.double()
    if not isinstance(momentum, Tensor) or running_mean is None or running_var is None:
        factor = 0.0 if isinstance(momentum, Tensor) else momentum
        return F.batch_norm(x, running_mean, running_var, weight, bias, True, factor, eps)
    # F.batch_norm takes a number: let it write the batch's own statistics, and average with the tensor.
    mean, var = running_mean.clone(), running_var.clone()
    y = F.batch_norm(x, mean, var, weight, bias, True, 1.0, eps)
    with torch.no_grad():
        running_mean.lerp_(mean, momentum.to(mean.dtype))
        running_var.lerp_(var, momentum.to(var.dtype))
    return y


def _is_torch_mix(x: Tensor, *per_channel: Tensor | None) -> bool:
    """Whether ``F.batch_norm`` takes these dtypes together: all the same, or float32 beside a half type's input."""
    dtypes = {t.dtype for t in per_channel if t is not None}
    return dtypes <= {x.dtype} or (x.dtype in SUM_DTYPE and dtypes == {torch.float32})
