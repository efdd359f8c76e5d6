"""The layer: nn.BatchNorm's words, keys and numbers, with the statistics of the batch on all ranks."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ddp, debug, functional
from .autograd import Layer
from .collectives import GroupSpec, ProcessGroupLike
from .compat import BatchNorm
from .debug.names import give_number


class SyncBatchNorm(BatchNorm):
    """Normalize with the statistics of the batch on all ranks; equal to ``nn.BatchNorm*d`` on the joined batch.

    In training ``y = (x - mean) / sqrt(var + eps) * weight + bias`` with mean and biased variance per channel over
    all ranks of ``process_group``, for any split of the batch, and running statistics move by ``momentum`` with the
    unbiased variance. In eval mode, without torch.distributed and in a group of one it is plain ``F.batch_norm``.

    Shapes: input and output ``(N, C, *)`` of two or more dimensions, N may be 0 on some ranks or on all.

    Collectives: see `functional.sync_batch_norm`: one exchange forward and one backward, none in eval mode. The first
    training forward makes the process groups of an int or "node", if conversion did not: a collective of the world.

    Args:
        num_features: Channels C of the input.
        eps: Added to the variance under the root.
        momentum: Part of the batch in the new running statistics; None for the cumulative average.
        affine: Whether the layer learns ``weight`` and ``bias``.
        track_running_stats: Whether to keep running statistics; without them eval mode uses those of its own batch.
        process_group: Ranks that share statistics: None for all, a number of consecutive ranks, "node", a
            ProcessGroup, or a DeviceMesh of one dimension.
        device: Device of parameters and buffers.
        dtype: Dtype of parameters and buffers.
        bias: Whether an affine layer has a ``bias``.

    Raises:
        ValueError: For an unusable ``process_group``; in forward, see `functional.sync_batch_norm`.

    Sources: Ioffe & Szegedy 2015, algorithm 1; Peng et al. 2018 (MegDet), section 3.3.

    Example:
        >>> import torch, syncbn
        >>> layer = syncbn.SyncBatchNorm(3)
        >>> y = layer(torch.randn(8, 3, 4, 4))
        >>> bool(y.mean((0, 2, 3)).abs().max() < 1e-6)
        True
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: ProcessGroupLike = None,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.process_group = process_group

    @property
    def process_group(self) -> Any:
        """Ranks that share statistics, as given; for a layer unpickled with a ProcessGroup, the group of its ranks."""
        spec = self._group_spec
        return spec.resolve() if spec.value is None and spec.ranks is not None else spec.value

    @process_group.setter
    def process_group(self, value: ProcessGroupLike | GroupSpec) -> None:
        self._group_spec = value if isinstance(value, GroupSpec) else GroupSpec(value)
        give_number(self)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input``; see the class."""
        self._check(input)
        if self.training:
            return functional.normalize([self._enter(input)], self._group_spec)[0]
        if debug.is_on():
            debug.pass_by(self)
        # without running statistics those of its own batch, on this rank alone, as nn.BatchNorm does
        running = self.running_mean, self.running_var
        return F.batch_norm(input, *running, self.weight, self.bias, running[0] is None, 0.0, self.eps)

    def _check(self, input: Tensor) -> None:
        self._check_input_dim(input)
        weight = self.weight
        parameter = self.running_mean if weight is None else weight
        num_features = self.num_features if parameter is None else parameter.size(0)
        functional.check_input(input, num_features, parameter, self.eps if self.training else None)

    def _enter(self, input: Tensor) -> Layer:
        """Begin a training step: hand over what it needs."""
        ddp.check_in(_has_subgroup if self._group_spec.is_subgroup else None)
        parameters, buffers = self._parameters, self._buffers  # getattr finds them after a long search
        try:
            weight, bias = parameters["weight"], parameters["bias"]
            mean, var, num_batches = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        except KeyError:  # set as other attributes
            weight, bias = self.weight, self.bias
            mean, var, num_batches = self.running_mean, self.running_var, self.num_batches_tracked
        if not self.track_running_stats:
            mean = var = num_batches = None
        return Layer(input, mean, var, weight, bias, self.momentum, self.eps, num_batches, self)

    def _check_input_dim(self, input: Tensor) -> None:
        """Check what the class that the layer was converted from checks, as nn.BatchNorm2d wants 4 dimensions."""
        original = self.__dict__.get("_syncbn_original")
        if original is None and not torch.compiler.is_compiling():
            self.__dict__["_input_dims"] = input.dim()  # so that revert(as_batchnorm=True) finds the right class
        check = getattr(original.cls, "_check_input_dim", None) if original is not None else None
        if check is not None:
            check(self, input)

    def extra_repr(self) -> str:
        """Show the constructor's arguments, the process group only where it is not the world."""
        group = f", process_group={self._group_spec!r}" if self._group_spec.is_subgroup else ""
        return f"{super().extra_repr()}{group}"  # type: ignore[no-untyped-call]

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: ProcessGroupLike = None) -> nn.Module:
        """Convert every BatchNorm of ``module``: the same call as torch's, done by `syncbn.convert`."""
        from . import convert  # the door: conversion knows the layer, not the other way round

        return convert(module, process_group=process_group)


def forward_coalesced(layers: Sequence[SyncBatchNorm], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Run independent layers in train mode and of one process group on their inputs: one exchange each way.

    Forward hooks are not run: the caller has made sure that there are none.
    """
    for layer, x in zip(layers, inputs, strict=True):
        layer._check(x)
    entered = [layer._enter(x) for layer, x in zip(layers, inputs, strict=True)]
    return functional.normalize(entered, layers[0]._group_spec)


def _has_subgroup(module: nn.Module) -> bool:
    return isinstance(module, SyncBatchNorm) and module._group_spec.is_subgroup


class SyncBatchNormAct(SyncBatchNorm):
    """SyncBatchNorm followed by ``drop`` and ``act``, what timm's fused BatchNormAct2d becomes."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize, then drop and activate."""
        y: Tensor = self.act(self.drop(super().forward(input)))  # type: ignore[operator]
        return y
