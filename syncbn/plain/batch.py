"""The sums of a batch that is spread over ranks, in plain operators around one exchange.

autograd and torch.func differentiate them to any order. What normalizes otherwise than BatchNorm starts from here.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import private
from ..distributed.exchange import DifferentiableSum
from ..ops.checks import refuse_count
from ..ops.layout import SUM_DTYPE, per_channel
from ..ops.reference import Running, batch_statistics, moments
from .mask import Weights, check_mask, weights_of


class Batch(NamedTuple):
    """A batch on all ranks: this rank's values and everybody's sums, which are functions of the values."""

    summed: Tensor  # [sum, sqsum, count] over all ranks, (2C + 1,), float64
    centred: Tensor  # x - shift, half types in float32
    shift: Tensor  # (C,), float64
    weights: Weights | None  # of a mask
    is_again: bool  # in a recomputation by activation checkpointing: the first pass has moved the statistics
    dtype: torch.dtype  # of x

    def mean_var(self) -> tuple[Tensor, Tensor]:
        """Compute mean and biased variance, ``(C,)``; zeros of a batch without values."""
        mean, sqdev = moments(self.summed)
        return mean, sqdev / self.summed[-1].clamp(min=1)

    def move(self, running: Running) -> None:
        """Count the batch and move the running statistics, but not again in a recomputation."""
        if self.is_again:
            return
        if running.num_batches_tracked is not None:
            running.num_batches_tracked.add_(1)
        batch_statistics(self.summed.detach(), running, 1.0, is_empty=True)  # nobody uses the invstd of this eps

    def scale(self, mean: Tensor, slope: Tensor, bias: Tensor | None) -> Tensor:
        """Compute ``y = (x - mean) * slope + bias`` with ``(C,)`` each, in the dtype of x; 0 in padding."""
        constant = (self.shift - mean) * slope if bias is None else bias + (self.shift - mean) * slope
        slope, constant = slope.to(self.centred.dtype), constant.to(self.centred.dtype)
        y = self.centred * per_channel(slope, self.centred) + per_channel(constant, self.centred)
        return (y if self.weights is None else torch.where(self.weights.padding, 0, y)).to(self.dtype)


def join(
    x: Tensor,
    eps: float,
    momentum: float | Tensor | None,
    group: ProcessGroup | None,
    name: str,
    mask: Tensor | None = None,
) -> Batch:
    """Sum ``x``, already checked, over the ranks of ``group``: one exchange of 2C + 1 numbers, and one backward.

    ``eps``, ``momentum`` and ``name`` are for messages. Raises a ValueError on all ranks for one value per channel.
    """
    weights = None
    if mask is not None:
        check_mask(mask, x)
        weights = weights_of(mask, x)
    is_again = not torch.compiler.is_compiling() and private.running_backward() != -1
    packed, centred, shift = local_sums(x, weights)
    if group is not None and torch.compiler.is_compiling():
        packed = DifferentiableSum.apply(packed, group, name, "forward", ())
    elif group is not None:
        like_x = torch.empty(0, x.shape[1], dtype=x.dtype, device="meta")  # does not keep x alive
        facts = like_x, torch.is_grad_enabled() and x.requires_grad, eps, 0.0 if is_again else momentum
        direction = "forward" + " with a mask" * (mask is not None) + " again" * is_again  # for the order check
        packed = TransformableSum.apply(packed, group, name, direction, facts)
    if weights is not None or x.numel() <= x.shape[1]:
        for count in private.without_vmap(packed[-1].detach()):
            refuse_count(count)
    return Batch(packed, centred, shift, weights, is_again, x.dtype)


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
