"""One process stands for W ranks: the same numbers as W processes, from one forward of their joined batches.

What W ranks compute with BatchNorm is ghost batch normalization of the joined batch; synchronized in groups of g it
has W / g splits. Batches accumulated into one optimizer step are further splits, whose statistics move in turn. So
one forward and backward stands for a whole step of all ranks, at any batch size.

That is exact if every normalization sees the batch in dimension 0, in the order of the ranks and equally much of each,
and nothing else joins images or is random per rank. `check_exact` finds out on the first batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import syncbn
from syncbn.experiment.batches import BatchPlan
from syncbn.experiment.task import Task

Batch = tuple[Tensor, Tensor]
INSTEAD = "use engine=torchrun (for launch/train.py: torchrun --nproc-per-node, without simulate)"
TOLERANCE = 1e-8  # relative, between float64 computations of the same numbers: rounding is below 1e-12


class SimulatedBatchNorm(syncbn.GhostBatchNorm):
    """Normalize by group of ranks and accumulated batch, and keep what each group holds; a rank reads its group's.

    `running_mean` and `running_var` are rank 0's, as DDP saves them; the state_dict has only these.

    Args:
        layer: The layer whose place it takes.
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
        self.split_size = split_size  # rows of one split, times those of one image
        if layer.running_mean is not None:
            self.load_state_dict(dict(layer.named_buffers()), strict=False)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load rank 0's statistics into every rank, as DDP does."""
        super()._load_from_state_dict(*args, **kwargs)
        if self.track_per_split:
            for name in ("running_mean", "running_var"):
                getattr(self, f"split_{name}").copy_(getattr(self, name))

    def _splits_of(self, x: Tensor) -> int:
        if len(x) % (self.split_size * self.num_splits):
            raise ValueError(
                f"cannot simulate: expected inputs of a multiple of {self.split_size * self.num_splits} rows at every "
                f"normalization, got {tuple(x.shape)}; {INSTEAD}"
            )
        num_splits = len(x) // self.split_size
        if x.numel() == num_splits * x.shape[1]:
            raise ValueError(
                "Expected more than 1 value per channel when training, got 1 over all ranks that share statistics"
            )
        return num_splits

    def _track(self, mean: Tensor, var: Tensor) -> None:
        """Move every group's statistics by its accumulated batches in turn; `(k * num_splits, C)` each."""
        assert self.num_batches_tracked is not None
        num_batches = len(mean) // self.num_splits
        for name, batches in (("running_mean", mean), ("running_var", var)):
            running = getattr(self, f"split_{name}")
            for i, batch in enumerate(batches.view(num_batches, self.num_splits, -1)):
                seen = self.num_batches_tracked + i + 1
                running.lerp_(batch, 1 / seen.to(batch.dtype) if self.momentum is None else self.momentum)
            getattr(self, name).copy_(running[0])
        self.num_batches_tracked.add_(num_batches)


def simulate(model: nn.Module, plan: BatchPlan, node_size: int | None = None) -> None:
    """Exchange every layer whose statistics come from the batch by one that stands for all ranks of `plan`.

    Args:
        model: Already converted to the arm, and to be fed joined batches (`BatchPlan.deal` with rank None).
        plan: Batch sizes and ranks.
        node_size: Ranks of one node, for groups of "node"; None if all are on one.

    Raises:
        ValueError: a group that cannot be simulated, or does not divide the ranks.
    """
    for layer in list(model.modules()):
        if isinstance(layer, _BatchNorm) and not isinstance(layer, syncbn.GhostBatchNorm):
            size = _group_size(layer, plan.world_size, node_size or plan.world_size)
            new = SimulatedBatchNorm(layer, plan.world_size // size, plan.per_rank_batch_size * size)
            syncbn.convert(layer, partial(_take, new))
            layer._non_persistent_buffers_set |= {"split_running_mean", "split_running_var"}


def _take(module: nn.Module, num_features: int) -> nn.Module:
    return module


def _group_size(layer: _BatchNorm, world_size: int, node_size: int) -> int:
    if not isinstance(layer, syncbn.SyncBatchNorm | nn.SyncBatchNorm):
        return 1
    group = layer.process_group
    size = {None: world_size, "node": node_size}.get(group, group)
    if isinstance(size, bool) or not isinstance(size, int):
        raise ValueError(f"cannot simulate the process group {group!r}; {INSTEAD}")
    if world_size % size:
        choices = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise ValueError(f"groups of {size} do not divide {world_size} ranks; choose one of {choices}")
    return size


def check_exact(task: Task, batch: Batch, plan: BatchPlan) -> None:
    """Refuse what one process cannot stand for; everything is restored.

    In float64, with the normalizations held at their running statistics, each rank's images alone must give the same
    inputs to every normalization, and the same mean gradients, as all images joined.

    Args:
        task: After `simulate`.
        batch: The first joined batch.
        plan: Batch sizes and ranks.

    Raises:
        ValueError: what differs, and what to do instead.
    """
    twin = copy.deepcopy(task).double().train()
    layers = {name: layer for name, layer in twin.named_modules() if isinstance(layer, SimulatedBatchNorm)}
    for layer in layers.values():
        layer.eval()
    images, labels = batch[0].double(), batch[1]
    with _random_state_restored() as has_drawn:
        joined = _run(twin, layers, (images, labels))
        if has_drawn():
            raise ValueError(f"cannot simulate a model that is random per rank (such as by dropout); {INSTEAD}")
    parts = list(zip(*(torch.split(t, plan.per_rank_batch_size) for t in (images, labels)), strict=True))
    grads = [torch.zeros_like(grad) for grad in joined[1]]
    for index, part in enumerate(parts):
        inputs, part_grads = _run(twin, layers, part)
        _compare_inputs(joined[0], inputs, index, len(parts))
        grads = [a + b / len(parts) for a, b in zip(grads, part_grads, strict=True)]
    names = [name for name, p in twin.named_parameters() if p.requires_grad]
    for name, whole, mean in zip(names, joined[1], grads, strict=True):
        if not _is_close(whole, mean):
            raise ValueError(
                f"cannot simulate: the gradient of {name} from all images joined is not the mean over the ranks, so "
                f"something but a known normalization joins the images of a batch; {INSTEAD}"
            )


Inputs = dict[str, list[Tensor]]


def _run(task: Task, layers: dict[str, SimulatedBatchNorm], batch: Batch) -> tuple[Inputs, list[Tensor]]:
    """Return the inputs of every call of the layers, by name, and the gradients of all parameters."""
    inputs: Inputs = {name: [] for name in layers}

    def keep(name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        inputs[name].append(args[0].detach())

    hooks = [layer.register_forward_pre_hook(partial(keep, name)) for name, layer in layers.items()]
    try:
        parameters = [p for p in task.parameters() if p.requires_grad]
        grads = torch.autograd.grad(task.loss(batch), parameters, allow_unused=True, materialize_grads=True)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs, list(grads)


def _compare_inputs(joined: Inputs, part: Inputs, index: int, num_parts: int) -> None:
    for name, calls in joined.items():
        if len(calls) != len(part[name]):
            raise ValueError(f"cannot simulate: {name} runs {len(calls)} times or {len(part[name])}; {INSTEAD}")
        for whole, own in zip(calls, part[name], strict=True):
            rows = len(whole) // num_parts
            if len(own) != rows or not _is_close(whole[index * rows : (index + 1) * rows], own):
                raise ValueError(
                    f"cannot simulate: the input of {name or 'the normalization'} does not keep the images of the "
                    f"ranks in order in dimension 0, equally many of each; {INSTEAD}"
                )


def _is_close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * (1e-30 + a.abs().max())) if len(a) else True


@contextmanager
def _random_state_restored() -> Iterator[Callable[[], bool]]:
    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]

    with torch.random.fork_rng():
        before = states()
        yield lambda: any(not torch.equal(a, b) for a, b in zip(before, states(), strict=True))
