"""A training step in plain operators around one exchange, which autograd and torch.func differentiate to any order.

Slower than `ops.autograd`, and more general: it serves masks, torch.func (grad, vjp, jvp, vmap) and forward-mode AD.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import private
from ..distributed.exchange import DifferentiableSum
from ..ops.checks import check_input, refuse_count
from ..ops.layout import SUM_DTYPE, per_channel
from ..ops.reference import Running, batch_statistics
from .mask import Weights, check_mask, weights_of


def plain_step(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running,
    eps: float,
    group: ProcessGroup | None,
    name: str,
    num_features: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Do what `ops.autograd.train_step` does, with the same arguments; with a mask w over valid positions only.

    ``n = sum(w)``, ``mean = sum(w * x) / n`` and ``var = sum(w * x**2) / n - mean**2`` over all ranks, and y is 0
    where w is 0. One exchange of 2C + 1 numbers forward, and one backward. Errors: see `functional.sync_batch_norm`.
    """
    check_input(x, weight, running.mean, eps, num_features)
    weights = None
    if mask is not None:
        check_mask(mask, x)
        weights = weights_of(mask, x)
    is_again = not torch.compiler.is_compiling() and private.running_backward() != -1
    if is_again:  # a recomputation: the first pass has moved the statistics
        running = Running()
    packed, centred, shift = local_sums(x, weights)
    if group is not None and torch.compiler.is_compiling():
        packed = DifferentiableSum.apply(packed, group, name, "forward", ())
    elif group is not None:
        like_x = torch.empty(0, x.shape[1], dtype=x.dtype, device="meta")  # does not keep x alive
        facts = like_x, torch.is_grad_enabled() and x.requires_grad, eps, running.momentum
        direction = "forward" + " with a mask" * (mask is not None) + " again" * is_again  # for the order check
        packed = TransformableSum.apply(packed, group, name, direction, facts)
    if weights is not None or x.numel() <= x.shape[1]:
        for count in private.without_vmap(packed[-1].detach()):
            refuse_count(count)
    if running.num_batches_tracked is not None:
        running.num_batches_tracked.add_(1)
    batch_statistics(packed.detach(), running, eps, is_empty=True)
    mean, invstd = batch_statistics(packed, Running(), eps, is_empty=True)[:-1].chunk(2)
    slope = (invstd if weight is None else invstd * weight).to(centred.dtype)
    constant = (shift - mean) * slope if bias is None else bias + (shift - mean) * slope
    y = centred * per_channel(slope, x) + per_channel(constant.to(centred.dtype), x)
    return (y if weights is None else torch.where(weights.padding, 0, y)).to(x.dtype)


def local_sums(x: Tensor, weights: Weights | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Compute this rank's ``packed = [sum, sqsum, count]``, ``(2C + 1,)``, and ``x - shift`` with the shift, ``(C,)``.

    The shift is this rank's mean, so that sums in the dtype of ``x`` are precise; it and ``packed`` are float64.
    """
    dims, x = [0, *range(2, x.dim())], x.to(SUM_DTYPE.get(x.dtype, x.dtype))
    if weights is None:
        count = torch.full((), x.numel() // x.shape[1], dtype=torch.float64, device=x.device)
        shift = x.detach().sum(dims) / max(x.numel() // x.shape[1], 1)
        centred = x - per_channel(shift, x)
        rest, sqrest = centred.sum(dims), centred.square().sum(dims)
    else:
        w, padding, count = weights
        x = torch.where(padding, 0, x)  # NaN too; masked_fill would not keep the memory format
        shift = (x.detach() * w).sum(dims) / count.clamp(min=torch.finfo(w.dtype).tiny).to(w.dtype)
        centred = x - per_channel(shift, x)
        rest, sqrest = (centred * w).sum(dims), (centred.square() * w).sum(dims)
    shift, rest = shift.double(), rest.double()
    sum = rest + count * shift
    return torch.cat([sum, sqrest.double() + shift * (rest + sum), count.view(1)]), centred, shift


class TransformableSum(DifferentiableSum):
    """`DifferentiableSum` for torch.func and forward-mode AD; torch.compile does not trace a Function with a jvp."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return TransformableSum.apply(dy, ctx.group, ctx.name, ctx.direction, ctx.facts), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        summed: Tensor = TransformableSum.apply(tangent, ctx.group, ctx.name, "forward-mode tangent", ctx.facts)
        return summed

    @staticmethod
    def vmap(_: Any, in_dims: tuple[int | None, ...], packed: Tensor, *arguments: Any) -> tuple[Tensor, int]:
        batched = packed.movedim(in_dims[0] or 0, 0)  # the exchange takes a flat buffer
        return TransformableSum.apply(batched.flatten(), *arguments).view(batched.shape), 0
