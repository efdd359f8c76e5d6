"""Simulate W ranks in one process: the same numbers as W processes, from one forward pass of their joined batches.

What W ranks compute with BatchNorm is ghost batch normalization of the joined batch; synchronized in groups of g it
has W / g splits. Batches accumulated into one optimizer step are further splits, which update the running statistics
one after another. So one forward and backward pass computes a whole step of all ranks, at any batch size.

That is exact if every normalization sees the batch in dimension 0, in the order of the ranks and equally much of each,
and nothing else joins images or is random per rank. `exactness.check_exact` finds out on the first batch.
"""

from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import syncbn
from experiment.simulation.joint import INSTEAD, JointLayer, is_joint, make_joint
from experiment.training.sharding import BatchPlan
from syncbn.distributed.subgroups import check_size
from syncbn.nn.activated import SyncBatchNormAct

_FORWARDS = {cls.forward for cls in (_BatchNorm, nn.SyncBatchNorm, syncbn.SyncBatchNorm, SyncBatchNormAct)}


class SimulatedBatchNorm(syncbn.GhostBatchNorm):
    """Normalize by group of ranks and accumulated batch, and keep what each group holds; a rank reads its group's.

    `running_mean` and `running_var` are rank 0's, as DDP saves them; the state_dict has only these.

    Args:
        layer: The layer that it replaces.
        num_groups: Groups of ranks that share statistics.
        split_size: Images of one group in one batch.
    """

    def __init__(self, layer: _BatchNorm, num_groups: int, split_size: int) -> None:
        like = next(layer.buffers(), next(layer.parameters(), torch.empty(0)))
        super().__init__(
            layer.num_features,
            num_groups,
            layer.eps,
            layer.momentum,
            layer.affine,
            layer.track_running_stats,
            like.device,
            like.dtype if like.is_floating_point() else None,
            bias=layer.bias is not None,
            track_per_split=True,
        )
        self._non_persistent_buffers_set |= {"split_running_mean", "split_running_var"}
        self.split_size = split_size
        self.num_images: int | None = None  # in the batch of the running forward
        self.calls: list[Tensor] = []  # of the running forward
        if layer.running_mean is not None:
            self.load_state_dict(dict(layer.named_buffers()), strict=False)

    def _splits_of(self, x: Tensor) -> int:
        num_images = self.num_images or len(x)
        num_splits, rest = divmod(num_images, self.split_size)
        if rest or num_splits % self.num_splits or len(x) % num_images:
            raise ValueError(
                f"cannot simulate: expected equally many rows of each image of batches of {self.split_size} in "
                f"{self.num_splits} groups, got {tuple(x.shape)} of {num_images} images; {INSTEAD}"
            )
        if x.numel() == num_splits * x.shape[1]:
            raise ValueError(
                "Expected more than 1 value per channel when training, got 1 over all ranks that share statistics"
            )
        return num_splits

    def _track(self, batch: Tensor, is_empty: bool) -> None:
        """Keep the statistics of one call, `(2, k * num_splits, C)`, until the whole model has run."""
        self.calls.append(batch)

    def catch_up(self) -> None:
        """Move every group's statistics as the ranks do: by one accumulated batch after the other, call by call."""
        assert self.num_batches_tracked is not None
        calls = [call.view(2, -1, self.num_splits, self.num_features) for call in self.calls]
        self.calls.clear()
        for batch in (call[:, i] for i in range(calls[0].shape[1] if calls else 0) for call in calls):
            self.num_batches_tracked.add_(1)
            factor = 1 / self.num_batches_tracked.to(batch.dtype) if self.momentum is None else self.momentum
            self.split_running_mean.lerp_(batch[0], factor)
            self.split_running_var.lerp_(batch[1], factor)
        self._buffers["running_mean"].copy_(self.split_running_mean[0])  # type: ignore[union-attr]
        self._buffers["running_var"].copy_(self.split_running_var[0])  # type: ignore[union-attr]


def simulate(model: nn.Module, plan: BatchPlan, node_size: int | None = None) -> None:
    """Exchange every layer whose statistics come from the batch by one that stands for all ranks of `plan`.

    `model` is called as a module, with the images first: it tells its layers how many there are, and the running
    statistics move when it has run, in the order of the ranks' batches also where it calls a layer twice.

    Args:
        model: Already converted to the arm, and to be fed joined batches (`BatchPlan.deal` with rank None).
        plan: Batch sizes and ranks.
        node_size: Ranks of one node, for groups of "node"; None if all are on one.

    Raises:
        ValueError: a group that cannot be simulated, or does not divide the ranks.
    """
    for name, layer in list(model.named_modules()):
        if not (_is_known(layer) or is_joint(layer)):  # check_exact finds out whether what is not known matters
            continue
        if not layer.track_running_stats:
            raise ValueError(
                f"cannot simulate {name}: without running statistics it evaluates by the batch, whose size is "
                f"the rank's; {INSTEAD}"
            )
        size = _group_size(layer, plan.world_size, node_size or plan.world_size)
        if not is_joint(layer):
            new = SimulatedBatchNorm(layer, plan.world_size // size, plan.per_rank_batch_size * size)
            syncbn.convert(layer, partial(_take, new))
        elif size == plan.world_size:
            make_joint(layer, plan.per_rank_batch_size * size)
        else:
            kind = type(layer).__name__
            raise ValueError(f"cannot simulate {name}: a {kind} in groups of {size} of {plan.world_size}; {INSTEAD}")
    model.register_forward_pre_hook(_begin)
    model.register_forward_hook(_end)


def _begin(model: nn.Module, args: tuple[Tensor]) -> None:
    for layer in model.modules():
        if isinstance(layer, JointLayer):
            layer.begin(len(args[0]), model.training)
        elif isinstance(layer, SimulatedBatchNorm):
            layer.num_images = len(args[0])
            layer.calls.clear()  # of a forward that failed


def _end(model: nn.Module, args: Any, output: Any) -> None:
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, SimulatedBatchNorm) and layer.calls:
                layer.catch_up()


def _take(module: nn.Module, num_features: int) -> nn.Module:
    return module


def _is_known(layer: nn.Module) -> TypeGuard[_BatchNorm]:
    """Whether `layer` is a BatchNorm whose forward does nothing but normalize, and perhaps activate as timm's do."""
    return (
        isinstance(layer, _BatchNorm)
        and (type(layer).forward in _FORWARDS or type(layer).__module__ == "timm.layers.norm_act")
        and syncbn.plan(layer, partial(_take, nn.Identity()))[0].to is not None
    )


def _group_size(layer: _BatchNorm, world_size: int, node_size: int) -> int:
    if not isinstance(layer, syncbn.SyncBatchNorm | nn.SyncBatchNorm):
        return 1
    group = layer.process_group
    size = {None: world_size, "node": node_size}.get(group, group)
    if isinstance(size, bool) or not isinstance(size, int):
        raise ValueError(f"cannot simulate the process group {group!r}; {INSTEAD}")
    check_size(size, world_size)
    return min(size, world_size)
