"""Batch renormalization: BatchNorm that normalizes in training almost as in eval mode, by its moving statistics."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from ..distributed.groups import ProcessGroupLike
from ..ops import recompute
from ..ops.checks import check_input
from ..plain.batch import Batch, join
from .batchnorm import SyncBatchNorm

NO_WARMUP = (
    "warmup_steps=0 corrects the first batches towards moving statistics of 0 and 1, unless those were trained."
)


class BatchRenorm(SyncBatchNorm):
    """Normalize with the statistics of the batch on all ranks, corrected towards the moving ones within limits.

    In training, with mean and biased variance per channel over all ranks, ``std = sqrt(var + eps)``, the moving ``m =
    running_mean`` and ``s = sqrt(running_var + eps)`` from before this batch, and r and d as constants:

    - ``r = clip(std / s, 1 / r_max, r_max)``, ``d = clip((mean - m) / s, -d_max, d_max)``
    - ``y = ((x - mean) / std * r + d) * weight + bias``
    - then ``m += momentum * (mean - m)``, ``s += momentum * (std - s)`` and ``running_var = s**2 - eps``

    So eval mode is plain ``F.batch_norm``, and ``running_var`` is biased. The limits are 1 and 0 (plain BatchNorm) for
    ``warmup_steps`` training forwards, then rise linearly to ``r_max`` and ``d_max``. ``num_batches_tracked`` is the
    clock, of micro-batches under gradient accumulation. All ranks compute the same r and d if their buffers begin
    alike, as DistributedDataParallel makes them when constructed. Without any value only the clock moves. Shapes,
    keys and ``layer(x, mask)`` as in SyncBatchNorm; plain operators, so slower. Collectives in training: one exchange
    of 2C + 1 numbers forward, one backward.

    Args:
        momentum: Part of the batch in the new moving statistics; small, as they take part in training.
        r_max: 1 or more, also inf; d_max: 0 or more.
        warmup_steps: Training forwards of plain BatchNorm; 0 warns. The defaults are the paper's, of about 130 000.
        r_ramp_steps: Training forwards in which the limit of r then rises, 0 for at once; d_ramp_steps: that of d.

    Raises:
        ValueError: For a word out of its range, or ``track_running_stats=False``. In training as
            `functional.sync_batch_norm`, and in recomputations of reentrant (or nested) activation checkpoints.

    Source: Ioffe 2017, arXiv 1702.03275, algorithm 1 and section 4.

    Examples:
        >>> import syncbn
        >>> [limit.item() for limit in syncbn.BatchRenorm(3, warmup_steps=100).limits()]
        [1.0, 0.0]
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: ProcessGroupLike = None,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup_steps: int = 5_000,
        r_ramp_steps: int = 35_000,
        d_ramp_steps: int = 20_000,
    ) -> None:
        _check("r_max", r_max, 1)
        _check("d_max", d_max, 0)
        _check("momentum", 0 if momentum is None else momentum, 0, 1)
        for name, steps in zip(_WORDS[2:], (warmup_steps, r_ramp_steps, d_ramp_steps), strict=True):
            _check(name, steps, 0, kind=int)
        if not track_running_stats:
            raise ValueError("BatchRenorm needs moving statistics, got track_running_stats=False; exclude the layer")
        if warmup_steps == 0:
            warnings.warn(NO_WARMUP, stacklevel=2)
        super().__init__(num_features, eps, momentum, affine, True, process_group, device, dtype, bias=bias)
        self.r_max, self.d_max = float(r_max), float(d_max)
        self.warmup_steps, self.r_ramp_steps, self.d_ramp_steps = warmup_steps, r_ramp_steps, d_ramp_steps

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize ``input``; see the class."""
        if not self.training:
            return self._evaluate(input, mask)
        check_input(input, self.weight, self.running_mean, self.eps, self.num_features)
        batch = join(input, self.eps, self.momentum, *self._group_and_name(), mask)
        mean, var = batch.mean_var()
        std = torch.sqrt(var + self.eps)
        r, shift = self._correction(batch, mean.detach(), std.detach()).unbind()
        weight = 1 if self.weight is None else self.weight
        return batch.scale(mean, r / std * weight, shift * weight + (0 if self.bias is None else self.bias))

    def limits(self) -> tuple[Tensor, Tensor]:
        """Compute the limits of r and d for the next training batch, ``()`` each; nothing is read on the host."""
        steps = self.num_batches_tracked.double() - self.warmup_steps
        ramps = self.r_ramp_steps, self.d_ramp_steps
        r_part, d_part = ((steps / ramp).clamp(0, 1) if ramp else (steps >= 0).double() for ramp in ramps)
        r_max, d_max = 1 + (self.r_max - 1) * r_part, self.d_max * d_part
        return torch.where(r_part > 0, r_max, 1), torch.where(d_part > 0, d_max, 0)  # inf * 0 is NaN

    def _correction(self, batch: Batch, mean: Tensor, std: Tensor) -> Tensor:
        """Compute r and d, ``(2, C)``, and move the statistics; in a recomputation, find those of its first pass."""
        if batch.is_again:
            if (kept := recompute.replay()) is None:
                raise ValueError(_NO_REPLAY)
            return kept
        old_mean, old_std = self.running_mean.double(), torch.sqrt(self.running_var.double() + self.eps)
        r_max, d_max = self.limits()
        r = torch.clamp(std / old_std, 1 / r_max, r_max)
        correction = torch.stack([r, torch.clamp((mean - old_mean) / old_std, -d_max, d_max)])
        if not torch.compiler.is_compiling():
            recompute.record(correction)
        self._move(batch.summed[-1].detach() > 0, mean - old_mean, old_std, std - old_std)
        return correction

    def _move(self, has_values: Tensor, mean_step: Tensor, old_std: Tensor, std_step: Tensor) -> None:
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            momentum = 1 / self.num_batches_tracked.double() if self.momentum is None else self.momentum
            step = torch.where(has_values, std_step * momentum, 0)
            self.running_mean.add_(torch.where(has_values, mean_step * momentum, 0))
            self.running_var.add_(step * (2 * old_std + step)).clamp_(min=0)  # (old_std + step)**2 - eps, no rounding

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return ", ".join([super().extra_repr(), *(f"{name}={getattr(self, name)}" for name in _WORDS)])


_WORDS = ("r_max", "d_max", "warmup_steps", "r_ramp_steps", "d_ramp_steps")
_NO_REPLAY = (
    "BatchRenorm: r and d of the first pass are kept for a recomputation by a checkpoint with use_reentrant=False, "
    "outside of any other, from torch 2.7 on; make it one, or leave this layer out of it."
)


def _check(name: str, value: Any, least: float, most: float = math.inf, kind: Any = (int, float)) -> None:
    if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
        limit = f"{least} or more" if most > 1 else f"from {least} to {most}"
        what = "a whole number of training forwards" if kind is int else "a number"
        raise ValueError(f"{name}={value!r}: expected {what}, {limit}")
