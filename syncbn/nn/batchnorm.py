"""The layer: nn.BatchNorm's arguments, keys and numbers, with the statistics of the batch on all ranks."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..compat import BatchNorm
from ..distributed import ddp
from ..distributed.exchange import group_of, note_eval
from ..distributed.groups import GroupSpec, ProcessGroupLike
from ..local import evaluate, one_process
from ..ops.autograd import is_transformed, train_step
from ..ops.checks import check_input
from ..ops.reference import Running
from ..plain.step import plain_step
from ..private import active_ddp


class SyncBatchNorm(BatchNorm):
    """Normalize with the statistics of the batch on all ranks; equal to ``nn.BatchNorm*d`` on the joined batch.

    In training ``y = (x - mean) / sqrt(var + eps) * weight + bias`` with mean and biased variance per channel over
    all ranks of ``process_group``, for any split of the batch, and running statistics move by ``momentum`` with the
    unbiased variance. In eval mode, without torch.distributed and in a group of one it is plain ``F.batch_norm``.

    Called as ``layer(x, mask)`` it leaves out what is padding: see ``mask`` of `functional.sync_batch_norm`.

    Shapes: input and output ``(N, C, *)`` of two or more dimensions, N may be 0 on some ranks or on all.

    Collectives: see `functional.sync_batch_norm`: one exchange forward and one backward, none in eval mode. The first
    training forward makes the process groups of an int or "node", if conversion did not: a collective of the world.

    Args:
        process_group: Ranks that share statistics: None for all, a number of consecutive ranks, "node", a
            ProcessGroup, or a DeviceMesh (all its ranks).
        bias: Whether an affine layer has a ``bias``. All other arguments are those of ``nn.BatchNorm2d``.

    Raises and sources: see `functional.sync_batch_norm`; a ValueError for an unusable ``process_group``.

    Examples:
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

    _layer_name: str | None = None  # "path (class of the model)", for messages
    _last_dims: int | None = None  # dimensions of the last input; None if there was none
    group_spec: GroupSpec  # process_group as a value that copies and pickles

    @property
    def process_group(self) -> Any:
        """Ranks that share statistics, as given; for a layer unpickled with a ProcessGroup, the group of its ranks."""
        return self.group_spec.given()

    @process_group.setter
    def process_group(self, value: ProcessGroupLike | GroupSpec) -> None:
        self.group_spec = value if isinstance(value, GroupSpec) else GroupSpec(value)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize ``input``; see the class."""
        self._check_input_dim(input)
        if not self.training:
            return self._evaluate(input, mask)
        running = Running()
        if self.track_running_stats:
            running = Running(self.running_mean, self.running_var, self.num_batches_tracked, self.momentum)
        (group, name), weight, bias = self._group_and_name(), self.weight, self.bias
        if group is None and mask is None:
            check_input(input, weight, running.mean, self.eps, self.num_features)
            return one_process(input, weight, bias, running, self.eps)
        if mask is not None or is_transformed():
            return plain_step(input, weight, bias, running, self.eps, group, name, self.num_features, mask)
        return train_step(input, weight, bias, running, self.eps, group, name, self.num_features)

    def _group_and_name(self) -> tuple[ProcessGroup | None, str]:
        """Find the ranks of this forward, None where there is nothing to exchange, and a name for messages."""
        name = ""  # in a graph one layer's name must not stand for all
        if not torch.compiler.is_compiling():
            if active_ddp() is not None:
                self._enter_ddp(active_ddp())
            name = self._layer_name or f"SyncBatchNorm({self.num_features})"
        return group_of(self.group_spec, name), name

    def _evaluate(self, x: Tensor, mask: Tensor | None) -> Tensor:
        check_input(x, self.weight, self.running_mean, None, self.num_features)
        self._note_eval()
        return evaluate(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps, mask)

    def _note_eval(self) -> None:
        if not torch.compiler.is_compiling():
            note_eval(self._layer_name or f"SyncBatchNorm({self.num_features})")

    def _check_input_dim(self, input: Tensor) -> None:
        """Note the dimensions; a class of converted layers checks them instead, as nn.BatchNorm2d wants 4."""
        if not torch.compiler.is_compiling():
            self.__dict__["_last_dims"] = input.dim()  # Module's own way takes longer

    def _enter_ddp(self, module: Any) -> None:
        """Take part in the forward pass of a DDP module; see `ddp`."""
        ddp.refuse_join(module)
        if self.group_spec.is_subgroup:
            ddp.keep_from_copies(module, lambda m: isinstance(m, SyncBatchNorm) and m.group_spec.is_subgroup)
        if self._layer_name is None:
            self._layer_name = f"SyncBatchNorm({self.num_features})"
            name_layers(module.module)

    def _adopt(self, spec: GroupSpec) -> dict[str, Any]:
        """Begin as a layer that was of another class so far; return what `_release` takes to end it."""
        before = {name: self.__dict__.pop(name) for name in _STATE if name in self.__dict__}
        self.__dict__.update(group_spec=spec)
        return before

    def _release(self, before: dict[str, Any]) -> int | None:
        """Give up what this class keeps on a layer, for what was there before `_adopt`; return the last dimensions."""
        state = {name: self.__dict__.pop(name, None) for name in _STATE}
        self.__dict__.update(before)
        return state["_last_dims"]  # type: ignore[no-any-return]

    def _get_name(self) -> str:
        cls = type(self)  # in print, not to be taken for torch's
        return f"syncbn.{cls.__name__}" if cls.__module__.startswith("syncbn.") else cls.__name__

    def extra_repr(self) -> str:
        """Show the constructor's arguments, the process group only where it is not the world."""
        group = f", process_group={self.group_spec!r}" if self.group_spec.is_subgroup else ""
        return f"{super().extra_repr()}{group}"  # type: ignore[no-untyped-call]

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: ProcessGroupLike = None) -> nn.Module:
        """Convert every BatchNorm of ``module``: the same call as torch's, done by `syncbn.convert`."""
        from .. import convert  # the door: conversion knows the layer, not the other way round

        return convert(module, process_group=process_group)


_STATE = ("group_spec", "_layer_name", "_last_dims")


def name_layers(model: nn.Module) -> None:
    """Name all SyncBatchNorm layers for messages: "path (class of the model)"."""
    for path, layer in model.named_modules():
        if isinstance(layer, SyncBatchNorm) and path:
            layer._layer_name = f"{path} ({type(model).__name__})"
