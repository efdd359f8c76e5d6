"""One training step of one layer over the ranks of a group: autograd, first and second order.

Forward: per-channel sums of the local part, one exchange, ``y = (x - mean) * invstd * weight + bias``.
Backward: per-channel sums of dy and dy * xhat, one exchange,
``dx = weight * invstd * (dy - sum_dy / n - xhat * sum_dy_xhat / n)`` with xhat = (x - mean) * invstd and n values per
channel over all ranks. The gradients of weight and bias stay local sums, as DDP averages them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import private
from ..distributed.exchange import DifferentiableSum, all_reduce
from . import backends, recompute, reference
from .checks import check_input, refuse_count
from .layout import PLAIN, per_channel
from .reference import Running


def train_step(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running,
    eps: float,
    group: ProcessGroup | None,
    name: str,
    num_features: int | None = None,
) -> Tensor:
    """Normalize ``x`` with the statistics of all ranks of ``group``: one exchange forward, one backward.

    Counts the batch, and moves the running statistics, but not in a recomputation. ``name`` is for messages,
    ``num_features`` for a layer without any tensor. Other arguments and errors: see `functional.sync_batch_norm`.
    """
    per_channel_tensors, table = (weight, bias, running.mean, running.var), backends.kernels_of
    kind = None if torch.compiler.is_compiling() else _kind(x, per_channel_tensors, num_features, not eps <= 0)
    kernels: backends.Kernels = None if kind is None else table.get(kind)
    if kernels is None:  # not seen before
        check_input(x, weight, running.mean, eps, num_features)
        kernels = backends.choose(x, *per_channel_tensors)
        if kind is not None:
            backends.remember(table, kind, kernels)
    y: Tensor = _BatchNorm.apply(x, weight, bias, kernels, torch.is_grad_enabled(), eps, group, name, *running)
    return y


def is_transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work, of which `train_step` knows nothing."""
    return not torch.compiler.is_compiling() and (private.are_transforms_active() or private.dual_level() >= 0)


def _kind(
    x: Tensor, per_channel_tensors: tuple[Tensor | None, ...], num_features: int | None, is_eps_positive: bool
) -> object:
    """Return what the choice of kernels, and the checks, depend on; None while operators are observed."""
    if private.num_dispatch_modes() or private.are_transforms_active() or private.jit_tracing_state() is not None:
        return None
    kind: list[object] = [num_features, is_eps_positive, type(x), x.dtype, x.device, x.is_neg(), x.shape, x.stride()]
    for t in per_channel_tensors:
        if t is None:
            kind.append(None)
        else:
            kind += type(t), t.dtype, t.is_cpu, t.shape, t.is_contiguous(), t.is_neg(), t.is_inference()
    return tuple(kind)


class _BatchNorm(torch.autograd.Function):
    """The statistics of the whole batch are functions of x in backward. Saves x, weight and O(C) numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any) -> Tensor:
        kernels, is_grad_enabled, eps, group, name, *buffers = rest
        running, summed, direction, keeps_sums = Running(*buffers), None, "forward", False
        in_backward = not torch.compiler.is_compiling() and private.running_backward() != -1
        if in_backward or (not torch.compiler.is_compiling() and private.top_saved_tensors_hooks(True)):
            if in_backward:  # a recomputation: the first pass has moved the statistics
                running, direction = Running(), "forward again"
            summed = recompute.replay()
            keeps_sums = summed is None
        if summed is None:
            packed = kernels.forward_reduce(x, running.num_batches_tracked)
            needs_gradient = is_grad_enabled and ctx.needs_input_grad[0]
            facts = x, needs_gradient, eps, running.momentum
            summed = all_reduce(packed, group, name, direction, facts)
            # with a global count of 1 every rank comes here; no other has to read it
            if x.numel() <= x.shape[1]:
                refuse_count(summed[-1])
        if keeps_sums:
            recompute.record(summed)
            ctx.summed = summed  # saved-tensor hooks are at work, perhaps those of `save_memory`
        y, statistics = kernels.forward_apply(x, summed, weight, bias, running, eps)
        ctx.save_for_backward(x, weight, statistics)
        ctx.set_materialize_grads(False)
        ctx.kernels, ctx.eps, ctx.group, ctx.name = kernels, eps, group, name
        if not torch.compiler.is_compiling():
            ctx.layout = x.stride(), x.dtype, None if weight is None else (weight.stride(), weight.dtype)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, statistics = ctx.saved_tensors
        needs_dx, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if dy is None:
            dy = torch.zeros_like(x)  # undefined here, perhaps not on the other ranks
        dtypes = weight.dtype if needs_weight else None, ctx.bias_dtype if needs_bias else None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return *_differentiable_backward(ctx, dy, x, weight, statistics, dtypes), *[None] * 9
        kernels: backends.Kernels = reference
        if not torch.compiler.is_compiling() and ctx.kernels is not reference:
            layout = x.stride(), x.dtype, None if weight is None else (weight.stride(), weight.dtype)
            readable = alike(dy, x) if layout == ctx.layout else None  # a hook or a conversion may have changed x
            if readable is not None:
                kernels, dy = ctx.kernels, readable
        packed, grad_weight, grad_bias = kernels.backward_reduce(dy, x, statistics, *dtypes)
        dx = None
        if needs_dx:
            summed = all_reduce(packed, ctx.group, ctx.name, "backward", (x,))
            dx = kernels.backward_apply(dy, x, statistics, weight, summed)
        return dx, grad_weight, grad_bias, *[None] * 9


STEP_NODE = f"{_BatchNorm.__name__}Backward"  # the name of its autograd nodes


def alike(dy: Tensor, x: Tensor) -> Tensor | None:
    """Return ``dy`` in the strides and dtype of ``x``, as kernels take it; None for what they cannot read."""
    if private.are_transforms_active() or private.jit_tracing_state() is not None:
        return None
    if private.num_dispatch_modes() and private.is_traced():
        return None
    if type(dy) not in PLAIN or dy.layout is not torch.strided:
        return None
    is_alike = dy.stride() == x.stride() and dy.dtype == x.dtype and dy.data_ptr() and not dy.is_neg()
    return dy if is_alike else torch.empty_like(x).copy_(dy)


def _differentiable_backward(
    ctx: Any, dy: Tensor, x: Tensor, weight: Tensor | None, statistics: Tensor, dtypes: tuple[Any, ...]
) -> tuple[Tensor | None, ...]:
    """Compute the gradients so that autograd can differentiate them again (``create_graph=True``).

    The moments are functions of the inputs of all ranks, so they are computed anew: one exchange of 2C numbers more,
    and every exchange has a gradient, which is one exchange. The known mean is a shift that keeps the sums small.
    """
    if not ctx.needs_input_grad[0]:
        _, *gradients = reference.backward_reduce(dy, x, statistics, *dtypes)  # seen by autograd
        return None, gradients[0], gradients[1]
    dims, num_features = [0, *range(2, x.dim())], x.shape[1]
    count, arguments = statistics[-1].clamp(min=1), (ctx.group, ctx.name, "backward with create_graph", (x,))
    xmu, dy = x.double() - per_channel(statistics[:num_features], x), dy.double()
    packed = torch.cat([xmu.sum(dims), xmu.square().sum(dims)])
    mean, sqmean = (DifferentiableSum.apply(packed, *arguments) / count).chunk(2)
    invstd = torch.rsqrt(sqmean - mean.square() + ctx.eps)
    xhat = (xmu - per_channel(mean, x)) * per_channel(invstd, x)
    packed = torch.cat([dy.sum(dims), (dy * xhat).sum(dims)])
    sum_dy, sum_dy_xhat = packed.chunk(2)
    mean_dy, mean_dy_xhat = (DifferentiableSum.apply(packed, *arguments) / count).chunk(2)
    scale = invstd if weight is None else invstd * weight
    dx = (dy - per_channel(mean_dy, x) - xhat * per_channel(mean_dy_xhat, x)) * per_channel(scale, x)
    grad_weight = None if dtypes[0] is None else sum_dy_xhat.to(dtypes[0])
    grad_bias = None if dtypes[1] is None else sum_dy.to(dtypes[1])
    return dx.to(x.dtype), grad_weight, grad_bias
