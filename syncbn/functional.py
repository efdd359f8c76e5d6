"""Normalize a batch that is spread over ranks: the whole layer as one function.

Forward: per-channel sums of the local part, one exchange, ``y = (x - mean) * invstd * weight + bias``.
Backward: per-channel sums of dy and dy * xhat, one exchange,
``dx = weight * invstd * (dy - sum_dy / n - xhat * sum_dy_xhat / n)`` with xhat = (x - mean) * invstd and n values per
channel over all ranks. The gradients of weight and bias stay local sums, as DDP averages them.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from . import kernels, moments, recompute
from .collectives import Exchange, GroupSpec, ProcessGroupLike, all_reduce
from .moments import Moments

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    process_group: ProcessGroupLike | GroupSpec = None,
) -> Tensor:
    """Normalize ``input`` with the statistics of the batch on all ranks of ``process_group``.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias`` per channel, equal to ``F.batch_norm`` of the ranks' inputs
    joined, for any split, uneven and empty ones included. Ioffe & Szegedy 2015, algorithm 1; Peng et al. 2018
    (MegDet), section 3.3.

    Collectives: in training, one all-reduce of 2C + 1 float64 numbers forward, and one of 2C backward if ``input``
    requires a gradient (which must be so on all ranks or on none). None if ``training`` is False, without a process
    group, or in a group of one: then this is ``F.batch_norm``.

    Args:
        input: ``(N, C, *)`` of float16, bfloat16, float32 or float64, the same dtype on every rank; N may be 0.
        running_mean: ``(C,)`` or None; updated in place in training.
        running_var: ``(C,)`` or None; updated in place in training, with the unbiased variance.
        weight: ``(C,)`` or None for 1.
        bias: ``(C,)`` or None for 0.
        training: Whether to use, and exchange, the statistics of the batch.
        momentum: Part of the batch in the new running statistics; a tensor is not read back to the host.
        eps: Added to the variance under the root.
        process_group: None for all ranks, a number of consecutive ranks, "node", a ProcessGroup or a DeviceMesh.

    Returns:
        A tensor of the shape, dtype and memory format of ``input``.

    Raises:
        ValueError: If ``input`` has another shape or dtype than stated (half types go with float32 parameters too),
            or a device without float64; if ``eps`` is not positive in training; on every rank alike, if all ranks
            together have one value per channel.
    """
    parameter = running_mean if weight is None else weight
    num_features = len(parameter) if parameter is not None else input.shape[1] if input.dim() > 1 else 0
    check_input(input, num_features, parameter)
    if training and eps <= 0:
        raise ValueError(f"expected eps to be positive in training, got {eps}.")
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps)
    spec = process_group if isinstance(process_group, GroupSpec) else GroupSpec(process_group)
    group = spec.resolve()
    recomputing = recompute.is_recomputing()
    if recomputing:
        momentum = 0.0  # the first pass has moved the running statistics
    if group is None:
        return _one_process(input, running_mean, running_var, weight, bias, momentum, eps)
    with torch.no_grad():  # the backward pass knows how the moments depend on the input
        batch = _global_moments(input, eps, group)
        if running_mean is not None and running_var is not None and not recomputing:
            may_be_empty = input.numel() == 0
            moments.update_running_statistics(running_mean, running_var, batch, momentum, may_be_empty)
    return cast(Tensor, _Normalize.apply(input, weight, bias, batch.count, batch.mean, batch.invstd, eps, group))


def check_input(x: Tensor, num_features: int, parameter: Tensor | None) -> None:
    """Refuse an input that does not fit the layer: what ``F.batch_norm`` refuses, on several processes as on one.

    Args:
        x: The input.
        num_features: Channels of the layer.
        parameter: One of its per-channel tensors, for the dtype; None if it has none.

    Raises:
        ValueError: See `sync_batch_norm`.
    """
    if x.dim() < 2:
        raise ValueError(f"expected an input of 2 or more dimensions (N, C, *), got shape {tuple(x.shape)}.")
    if x.dtype not in _DTYPES:
        raise ValueError(f"expected an input of a floating dtype, got {x.dtype}; convert it, as in input.float().")
    if x.device.type == "mps":
        raise ValueError("syncbn: the device 'mps' has no float64, in which the statistics travel; use CPU or CUDA.")
    if x.shape[1] == 0 or x.shape[1] != num_features:
        wanted = num_features or "at least 1"
        raise ValueError(f"expected an input of {wanted} channels (N, C, *), got {x.shape[1]} in {tuple(x.shape)}.")
    is_half = x.dtype in (torch.float16, torch.bfloat16)
    if parameter is not None and parameter.dtype not in (x.dtype, torch.float32 if is_half else x.dtype):
        raise ValueError(
            f"expected an input of the layer's dtype {parameter.dtype}, or of a half type for a float32 layer, "
            f"got {x.dtype}; convert one of them."
        )


def _one_process(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | Tensor,
    eps: float,
) -> Tensor:
    if not isinstance(momentum, Tensor) or running_mean is None or running_var is None:
        factor = 0.0 if isinstance(momentum, Tensor) else momentum
        return F.batch_norm(input, running_mean, running_var, weight, bias, True, factor, eps)
    # F.batch_norm takes a number: let it write the batch's own statistics, and average with the tensor.
    mean, var = running_mean.clone(), running_var.clone()
    y = F.batch_norm(input, mean, var, weight, bias, True, 1.0, eps)
    with torch.no_grad():
        running_mean.lerp_(mean, momentum.to(mean.dtype))
        running_var.lerp_(var, momentum.to(var.dtype))
    return y


class _Normalize(torch.autograd.Function):
    """Normalize with the moments of the whole batch, which are constants to autograd and functions of x in backward.

    Saves the input, the weight and O(C) numbers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        count: Tensor,
        mean: Tensor,
        invstd: Tensor,
        eps: float,
        group: ProcessGroup,
    ) -> Tensor:
        dtype = kernels.sum_dtype(x)
        mean, invstd = mean.to(dtype), invstd.to(dtype)
        ctx.save_for_backward(x, weight, count, mean, invstd)
        ctx.eps, ctx.group, ctx.bias_dtype = eps, group, None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return kernels.choose(x).normalize(x, mean, invstd, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, count, mean, invstd = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy  # undefined here, perhaps not on the other ranks
        needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad[:3]
        kernel = kernels.choose(x)
        if needs_dx and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            dx, sum_dy, sum_dy_xhat = _differentiable_backward(dy, x, weight, count, mean, ctx.eps, ctx.group)
            exchange = None
        else:
            dx, (sum_dy, sum_dy_xhat) = None, kernel.backward_sums(dy, x, mean, invstd)
            packed = torch.cat([sum_dy, sum_dy_xhat]).double() if needs_dx else None  # (2C,)
            exchange = None if packed is None else Exchange(packed, ctx.group)
        # while the exchange is under way
        dweight = sum_dy_xhat.to(weight.dtype) if needs_dweight else None
        dbias = sum_dy.to(ctx.bias_dtype) if needs_dbias else None
        if exchange is not None:
            dx = kernel.input_gradient(dy, x, mean, invstd, weight, exchange.wait(), count)
        return dx, dweight, dbias, None, None, None, None, None


def _global_moments(x: Tensor, eps: float, group: ProcessGroup) -> Moments:
    """Compute the moments over all ranks of ``group``: one exchange, none in a recomputation that has its record."""
    batch = recompute.replay()
    if batch is None:
        batch = moments.unpack(all_reduce(kernels.choose(x).local_sums(x), group), eps, x.numel() == 0)
        if x.numel() <= x.shape[1]:  # so it is on every rank, if the global count is 1; no other rank has to read it
            _refuse_one_value(batch.count)
        recompute.record(batch)
    return batch


def _refuse_one_value(count: Tensor) -> None:
    message = "Expected more than 1 value per channel when training, got 1 over all ranks of the process group"
    if torch.compiler.is_compiling():
        torch._assert_async(count.squeeze() != 1, message)
    elif count.item() == 1:
        raise ValueError(f"{message}. Use a larger batch or eval mode.")


def _differentiable_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    count: Tensor,
    shift: Tensor,
    eps: float,
    group: ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dx, sum_dy and sum_dy_xhat so that autograd can differentiate them again (``create_graph=True``).

    The moments are functions of the inputs of all ranks, so they are computed anew: one exchange of 2C numbers more,
    and every exchange has a gradient, which is one exchange. ``shift``, the known mean, keeps the sums small.
    """
    dims = [0, *range(2, x.dim())]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    count = count.clamp(min=1)
    xmu = x.double() - shift.double().view(shape)
    dy = dy.double()
    mean, sqmean = (all_reduce(torch.cat([xmu.sum(dims), xmu.square().sum(dims)]), group) / count).chunk(2)
    invstd = torch.rsqrt(sqmean - mean.square() + eps)
    xhat = (xmu - mean.view(shape)) * invstd.view(shape)
    sum_dy, sum_dy_xhat = dy.sum(dims), (dy * xhat).sum(dims)
    mean_dy, mean_dy_xhat = (all_reduce(torch.cat([sum_dy, sum_dy_xhat]), group) / count).chunk(2)
    scale = invstd if weight is None else invstd * weight
    dx = (dy - mean_dy.view(shape) - xhat * mean_dy_xhat.view(shape)) * scale.view(shape)
    return dx.to(x.dtype), sum_dy, sum_dy_xhat
