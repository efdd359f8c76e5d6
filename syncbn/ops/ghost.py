"""Normalize the parts of a batch, each by its own statistics: what GhostBatchNorm computes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten
# Below so many values per split, a call per split costs more than gathering the splits as channels (CPU, measured).
_MIN_SPLIT = 40_000


def ghost_batch_norm(
    x: Tensor,
    num_splits: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    batch: Tensor | None = None,
) -> Tensor:
    """Normalize each of ``num_splits`` consecutive parts of ``x`` by its own statistics.

    Args:
        x: ``(N, C, *)``; ``num_splits`` divides N.
        num_splits: Parts of the batch.
        weight: ``(C,)`` or None for 1.
        bias: ``(C,)`` or None for 0.
        eps: Added to the variance under the root.
        batch: Zeros ``(2, num_splits, C)`` to write the means and unbiased variances to, or None.

    Returns:
        A tensor of the shape, dtype and memory format of ``x``.
    """
    parameters = [tensor for tensor in (weight, bias, batch) if tensor is not None]
    is_large = x.device.type == "cpu" and x.numel() >= max(1, _MIN_SPLIT * num_splits)
    same = x.dtype in (torch.float32, torch.float64) and all(p.dtype == x.dtype for p in parameters)
    if is_large and same and _is_dense(x) and not torch.compiler.is_compiling():
        y: Tensor = _BySlices.apply(x, num_splits, weight, bias, eps, batch)
        return y
    return _as_channels(x, num_splits, weight, bias, eps, batch)


def _as_channels(
    x: Tensor, num: int, weight: Tensor | None, bias: Tensor | None, eps: float, batch: Tensor | None
) -> Tensor:
    """Gather the splits as channels, ``(N / S, S * C, *)``, for one call of F.batch_norm; autograd sees all of it."""
    rows = x.shape[0] // num
    weight, bias = (None if p is None else p.repeat(num) for p in (weight, bias))
    # momentum 1: the "running" statistics become those of the batch
    mean, var = (None, None) if batch is None else batch.view(2, -1)
    if _is_channels_last(x):
        *positions, channels = x.movedim(1, -1).shape[1:]
        parts = x.movedim(1, -1).reshape(num, rows, *positions, channels).movedim(0, -2)  # (N / S, *, S, C)
        joined = parts.reshape(rows, *positions, num * channels).movedim(-1, 1)
        y = F.batch_norm(joined, mean, var, weight, bias, True, 1.0, eps)
        y = y.movedim(1, -1).reshape(parts.shape).movedim(-2, 0)
        return y.reshape(len(x), *positions, channels).movedim(-1, 1)
    parts = x.reshape(num, rows, *x.shape[1:]).transpose(0, 1)  # (N / S, S, C, *)
    joined = parts.reshape(rows, num * x.shape[1], *x.shape[2:])
    y = F.batch_norm(joined, mean, var, weight, bias, True, 1.0, eps)
    return y.reshape(parts.shape).transpose(0, 1).reshape(x.shape)


class _BySlices(torch.autograd.Function):
    """A native call per split; forward reads and writes in place, backward copies dx once."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        num_splits: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        batch: Tensor | None,
    ) -> Tensor:
        y = torch.empty_like(x)
        mean, invstd = saved = x.new_empty(2, num_splits, x.shape[1])
        running = [[None] * num_splits] * 2 if batch is None else batch
        chunks = x.chunk(num_splits), y.chunk(num_splits)
        for x_s, y_s, mean_s, invstd_s, m, v in zip(*chunks, mean, invstd, *running, strict=True):
            out = {"out": y_s, "save_mean": mean_s, "save_invstd": invstd_s}
            _aten.native_batch_norm.out(x_s, weight, bias, m, v, True, 1.0, eps, **out)
        ctx.save_for_backward(x, weight, bias, saved)
        ctx.num_splits, ctx.eps = num_splits, eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: let autograd see plain operators
            inputs = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
            y = _as_channels(x, ctx.num_splits, weight, bias, ctx.eps, None)
            grads = dict(zip(map(id, inputs), torch.autograd.grad(y, inputs, dy, create_graph=True), strict=True))
            return grads.get(id(x)), None, grads.get(id(weight)), grads.get(id(bias)), None, None
        dx = torch.empty_like(x)
        dy = dy.contiguous(memory_format=_memory_format(x))
        sums = x.new_empty(2, ctx.num_splits, x.shape[1])  # of dy * xhat and dy
        chunks = (t.chunk(ctx.num_splits) for t in (x, dy, dx))
        for x_s, dy_s, dx_s, mean_s, invstd_s, dweight_s, dbias_s in zip(*chunks, *saved, *sums, strict=True):
            known = (weight, None, None, mean_s, invstd_s, True, ctx.eps, [True, True, True])
            _aten.native_batch_norm_backward.out(dy_s, x_s, *known, out0=dx_s, out1=dweight_s, out2=dbias_s)
        dweight, dbias = sums.sum(1)
        return dx, None, None if weight is None else dweight, None if bias is None else dbias, None, None


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and _memory_format(x) is not torch.contiguous_format


def _memory_format(x: Tensor) -> torch.memory_format:
    by_dims = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = by_dims.get(x.dim())
    return last if last is not None and x.is_contiguous(memory_format=last) else torch.contiguous_format


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=_memory_format(x))
