"""Ghost batch normalization: every part of the batch by its own statistics, as the ranks of a plain BatchNorm do."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compat import BatchNorm
from ..ops.checks import check_input
from ..ops.layout import memory_format

# Values per split below which a call per split costs more than gathering the splits as channels (CPU, measured).
_MIN_SPLIT = 40_000


class GhostBatchNorm(BatchNorm):
    """Normalize ``num_splits`` equal consecutive parts of the batch, each with its own statistics.

    In training ``y = (x - mean_s) / sqrt(var_s + eps) * weight + bias``, with mean and biased variance per channel of
    split s: what ``num_splits`` ranks with plain BatchNorm compute on the joined batch. The running statistics move
    by ``momentum`` towards the mean over the splits of their means and unbiased variances: the average of what the
    ranks would hold. Eval mode is plain ``F.batch_norm`` (without running statistics, by splits too).

    Shapes: input and output ``(N, C, *)`` of two or more dimensions, N a multiple of ``num_splits``; it communicates
    nothing.

    Args:
        num_features: Channels C of the input.
        num_splits: Parts of the batch.
        eps: Added to the variance under the root.
        momentum: Part of the batch in the new running statistics; None for the cumulative average.
        affine: Whether the layer learns ``weight`` and ``bias``.
        track_running_stats: Whether to keep running statistics.
        device: Device of parameters and buffers.
        dtype: Dtype of parameters and buffers.
        bias: Whether an affine layer has a ``bias``.
        track_per_split: Whether to keep also what each rank would hold: the buffers ``split_running_mean`` and
            ``split_running_var``, ``(num_splits, C)``. Else the state_dict is nn.BatchNorm's.

    Raises:
        ValueError: If ``num_splits`` is below 1; in forward, if it does not divide the batch, or for one value per
            channel in each split.

    Source: Hoffer, Hubara & Soudry 2017, algorithm 1 (there the splits move the running statistics in turn).

    Examples:
        >>> import torch, syncbn
        >>> x = torch.randn(8, 3, 4, 4)
        >>> y = syncbn.GhostBatchNorm(3, num_splits=2)(x)
        >>> torch.allclose(y[4:], torch.nn.BatchNorm2d(3)(x[4:]), atol=1e-5)
        True
    """

    split_running_mean: Tensor
    split_running_var: Tensor

    def __init__(
        self,
        num_features: int,
        num_splits: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        track_per_split: bool = False,
    ) -> None:
        if isinstance(num_splits, bool) or not isinstance(num_splits, int) or num_splits < 1:
            raise ValueError(f"num_splits: expected a whole number of at least 1, got {num_splits!r}.")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.num_splits, self.track_per_split = num_splits, track_per_split and track_running_stats
        if self.track_per_split:
            for name, start in (("split_running_mean", self.running_mean), ("split_running_var", self.running_var)):
                assert start is not None
                self.register_buffer(name, start.repeat(num_splits, 1))

    def reset_running_stats(self) -> None:
        """Reset the running statistics, those per split too."""
        super().reset_running_stats()
        if "split_running_mean" in self._buffers:
            self.split_running_mean.zero_()
            self.split_running_var.fill_(1)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        """Load; a state without statistics per split, such as nn.BatchNorm's, gives every split the same."""
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        for name in ("running_mean", "running_var") if self.track_per_split else ():
            key = f"{prefix}split_{name}"
            if key not in state_dict and f"{prefix}{name}" in state_dict:
                self._buffers[f"split_{name}"].copy_(self._buffers[name])  # type: ignore[union-attr,arg-type]
                missing[:] = [other for other in missing if other != key]

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input``; see the class."""
        check_input(input, self.weight, self.running_mean, None, self.num_features)
        if not self.training and self.running_mean is not None:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        tracks = self.training and self.track_running_stats
        num_splits = self._splits_of(input)
        batch = None
        if tracks:
            assert self.running_mean is not None
            batch = self.running_mean.new_zeros(2, num_splits, self.num_features)
        y = ghost_batch_norm(input, num_splits, self.weight, self.bias, self.eps, batch)
        if batch is not None:
            with torch.no_grad():
                self._track(batch, is_empty=input.numel() == 0)
        return y

    def _splits_of(self, x: Tensor) -> int:
        if len(x) % self.num_splits:
            raise ValueError(
                f"expected a batch that {self.num_splits} splits divide, got {len(x)} of {tuple(x.shape)}."
            )
        if x.numel() == self.num_splits * x.shape[1]:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got 1 in each of {self.num_splits} splits of "
                f"{tuple(x.shape)}. Use a larger batch, fewer splits or eval mode."
            )
        return self.num_splits

    def _track(self, batch: Tensor, is_empty: bool) -> None:
        """Move the running statistics towards the means and unbiased variances, ``(2, num_splits, C)``."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        if is_empty:
            return
        factor = 1 / self.num_batches_tracked.to(batch.dtype) if self.momentum is None else self.momentum
        for running, average in zip((self.running_mean, self.running_var), batch.mean(1), strict=True):
            assert running is not None
            running.lerp_(average, factor)
        if self.track_per_split:
            self.split_running_mean.lerp_(batch[0], factor)
            self.split_running_var.lerp_(batch[1], factor)

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return f"{super().extra_repr()}, num_splits={self.num_splits}"  # type: ignore[no-untyped-call]


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
    is_same_dtype = all(p.dtype == x.dtype for p in parameters)
    if (
        not (is_large and is_same_dtype and x.is_contiguous(memory_format=memory_format(x)))
        or torch.compiler.is_compiling()
    ):
        return _as_channels(x, num_splits, weight, bias, eps, batch)
    running = [[None] * num_splits] * 2 if batch is None else batch
    splits = zip(x.chunk(num_splits), *running, strict=True)
    return torch.cat([F.batch_norm(x_s, mean, var, weight, bias, True, 1.0, eps) for x_s, mean, var in splits])


def _as_channels(
    x: Tensor, num: int, weight: Tensor | None, bias: Tensor | None, eps: float, batch: Tensor | None
) -> Tensor:
    """Gather the splits as channels, ``(N / S, S * C, *)``, for one call of F.batch_norm; autograd sees all of it."""
    rows = x.shape[0] // num
    weight, bias = (None if p is None else p.repeat(num) for p in (weight, bias))
    # momentum 1: the "running" statistics become those of the batch
    mean, var = (None, None) if batch is None else batch.view(2, -1)
    if memory_format(x) is not torch.contiguous_format:
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
