"""Other ways to synchronize BatchNorm, written here from their published algorithms, for measurement only.

All are for training, with ``weight`` and ``bias`` and inputs that are not empty. They replace the
class of an ``nn.BatchNorm*d`` and so keep its parameters and buffers.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.compat import all_gather_single


class Floor(_BatchNorm):
    """Copy ``x`` four times: what a layer has to move that keeps nothing in a cache, at the speed of torch's copy.

    Forward reads x twice (sums, then normalization) and writes y; backward reads x and dy twice (sums, then dx) and
    writes dx. That is 6 reads and 2 writes, the traffic of four copies: forward ``y = x.clone()`` and a copy of x into
    memory that is already there, backward a copy of x into the same and ``dx = dy.clone()``.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Copy twice; the backward pass does so too."""
        scratch = self.__dict__.get("_scratch")
        if scratch is None or scratch.shape != input.shape or scratch.stride() != input.stride():
            scratch = self.__dict__["_scratch"] = torch.empty_like(input)
        return cast(Tensor, _FourCopies.apply(input, self.weight, self.bias, scratch))


class _FourCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, scratch: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.scratch = scratch.copy_(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        ctx.scratch.copy_(x)
        return dy.clone(), weight, bias, None


class ComposedBatchNorm(_BatchNorm):
    """Normalize with the statistics of all ranks, in operators that autograd differentiates: what CPU users have.

    One all-reduce of ``[sum, sqsum, count]`` whose gradient is an all-reduce again, as that of
    ``torch.distributed.nn.functional.all_reduce``; then ``y = x * scale + offset``. ``var = E[x**2] - E[x]**2`` in
    the dtype of the weight.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Sum, exchange, normalize."""
        x, dims = input.to(self.weight.dtype), _reduced_dims(input)
        count = x.new_full((1,), x.numel() // x.shape[1])
        packed: Tensor = _AllReduce.apply(torch.cat([x.sum(dims), x.square().sum(dims), count]))
        mean, sqmean = (packed[:-1] / packed[-1]).chunk(2)
        var = sqmean - mean.square()
        with torch.no_grad():
            _update(self, mean, var, packed[-1])
        scale = self.weight * torch.rsqrt(var + self.eps)
        offset = self.bias - mean * scale
        return (x * _per_channel(scale, x) + _per_channel(offset, x)).to(input.dtype)


class _AllReduce(torch.autograd.Function):
    """Sum over the ranks; the gradient of a sum that every rank uses is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return cast(Tensor, _AllReduce.apply(dy))


class GatherBatchNorm(_BatchNorm):
    """Normalize by the algorithm of torch's native SyncBatchNorm, in plain operators: its kernels are for GPUs.

    Forward: mean and invstd per rank, one all-gather of ``[mean, invstd, count]``, ranks without values left out, the
    rest merged. Backward: ``[sum_dy, sum_dy_xmu]`` per rank and one all-reduce.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Do all of it."""
        y, mean, var, count = _Gather.apply(input, self.weight, self.bias, self.eps)
        with torch.no_grad():
            _update(self, mean, var, count)
        return cast(Tensor, y)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
        x = x if _is_dense(x) else x.contiguous()
        var, mean = torch.var_mean(x.to(weight.dtype), _reduced_dims(x), correction=0)
        count = mean.new_full((1,), x.numel() // x.shape[1])
        combined = torch.cat([mean, torch.rsqrt(var + eps), count])  # (2C + 1,)
        gathered = combined.new_empty(dist.get_world_size() * len(combined))
        all_gather_single(gathered, combined)
        gathered = gathered.view(-1, len(combined))
        mean, var, counts = _merge(gathered[gathered[:, -1] >= 1], eps)
        invstd = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, weight, mean, invstd, counts)
        scale = invstd * weight
        y = torch.addcmul(_per_channel(bias - mean * scale, x), x, _per_channel(scale, x))
        count = counts.sum()
        ctx.mark_non_differentiable(mean, var, count)
        return y, mean, var, count

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, counts = ctx.saved_tensors
        dims, dtype = _reduced_dims(x), weight.dtype
        sum_dy = dy.sum(dims, dtype=dtype)
        sum_dy_xmu = (dy * (x - _per_channel(mean, x))).sum(dims, dtype=dtype)
        packed = torch.cat([sum_dy, sum_dy_xmu])  # (2C,)
        dist.all_reduce(packed)
        mean_dy, mean_dy_xmu = (packed / counts.sum()).chunk(2)
        of_x = -invstd.pow(3) * weight * mean_dy_xmu  # dx = of_dy * dy + of_x * x + constant
        of_dy = invstd * weight
        constant = -of_dy * mean_dy - of_x * mean
        dx = torch.addcmul(_per_channel(constant, x), x, _per_channel(of_x, x)).addcmul_(dy, _per_channel(of_dy, x))
        return dx, sum_dy_xmu * invstd, sum_dy, None


def _merge(gathered: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Merge ``(W, 2C + 1)`` statistics of ranks into the mean and variance of all, ``(C,)``, and the counts."""
    num_features = gathered.shape[1] // 2
    means, invstds, counts = torch.split(gathered, [num_features, num_features, 1], dim=1)
    part = counts / counts.sum()
    mean = (part * means).sum(0)
    var = (part * (invstds.pow(-2) - eps + (means - mean).square())).sum(0)
    return mean, var, counts


def _update(layer: _BatchNorm, mean: Tensor, var: Tensor, count: Tensor) -> None:
    """Move the running statistics."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert layer.num_batches_tracked is not None
    layer.num_batches_tracked.add_(1)
    layer.running_mean.lerp_(mean, layer.momentum or 0.0)
    layer.running_var.lerp_(var * (count / (count - 1)), layer.momentum or 0.0)


def replace(model: nn.Module, cls: type[_BatchNorm]) -> nn.Module:
    """Make every BatchNorm of ``model`` a ``cls``, in place."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = cls
    return model


def _reduced_dims(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.dtype).view(1, -1, *[1] * (x.dim() - 2))


def _is_dense(x: Tensor) -> bool:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)
    return x.is_contiguous() or x.is_contiguous(memory_format=last)
