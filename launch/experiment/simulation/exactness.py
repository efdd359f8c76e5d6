"""Check on the first batch that simulating several ranks in one process is exact for this model."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from experiment.simulation.joint import INSTEAD, JointLayer
from experiment.simulation.simulate import SimulatedBatchNorm
from experiment.training.sharding import BatchPlan
from experiment.training.task import Task

Batch = tuple[Tensor, Tensor]
Inputs = dict[str, list[Tensor]]
Simulated = SimulatedBatchNorm | JointLayer
TOLERANCE = 1e-8  # relative, between float64 computations of the same numbers: rounding is below 1e-12


def check_exact(task: Task, batch: Batch, plan: BatchPlan) -> None:
    """Refuse a model that one process cannot simulate exactly; all state is restored.

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
    layers = {name: layer for name, layer in twin.named_modules() if isinstance(layer, Simulated)}
    for layer in layers.values():
        layer.eval()
    images, labels = batch[0].double(), batch[1]
    others = {name: (b, b.clone()) for name, b in twin.named_buffers() if name.rpartition(".")[0] not in layers}
    with _random_state_restored() as has_drawn:
        joined = _run(twin, layers, (images, labels))
        if has_drawn():
            raise ValueError(f"cannot simulate a model that is random per rank (such as by dropout); {INSTEAD}")
    for name, (now, before) in others.items():
        if not torch.equal(now, before):
            raise ValueError(f"cannot simulate: training moves {name}, which would be each rank's own; {INSTEAD}")
    parts = list(zip(*(torch.split(t, plan.per_rank_batch_size) for t in (images, labels)), strict=True))
    grads = [torch.zeros_like(grad) for grad in joined[1]]
    for index, part in enumerate(parts):
        inputs, part_grads = _run(twin, layers, part)
        _compare_inputs(joined[0], inputs, index, len(parts))
        grads = [a + b / len(parts) for a, b in zip(grads, part_grads, strict=True)]
    names = [name for name, p in twin.named_parameters() if p.requires_grad]
    largest = max((grad.abs().max().item() for grad in joined[1]), default=0.0)
    for name, whole, mean in zip(names, joined[1], grads, strict=True):
        if not _is_close(whole, mean, largest):
            raise ValueError(
                f"cannot simulate: the gradient of {name} from all images joined is not the mean over the ranks, so "
                f"something but a known normalization joins the images of a batch; {INSTEAD}"
            )


def _run(task: Task, layers: dict[str, Simulated], batch: Batch) -> tuple[Inputs, list[Tensor]]:
    """Return the inputs of every call of the layers, by name, and the gradients of all parameters."""
    inputs: Inputs = {name: [] for name in layers}

    def keep(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[name].append([*args, *kwargs.values()][0].detach())

    hooks = [layer.register_forward_pre_hook(partial(keep, n), with_kwargs=True) for n, layer in layers.items()]
    try:
        parameters = [p for p in task.parameters() if p.requires_grad]
        loss = task.loss(batch)
        num_calls = sum(map(len, inputs.values()))
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    except Exception as error:
        raise ValueError(f"cannot simulate: the check in float64 failed ({error}); {INSTEAD}") from error
    finally:
        for hook in hooks:
            hook.remove()
    if sum(map(len, inputs.values())) > num_calls:
        raise ValueError(f"cannot simulate activation checkpointing, which runs normalizations twice; {INSTEAD}")
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


def _is_close(a: Tensor, b: Tensor, scale: float | None = None) -> bool:
    if a.shape != b.shape or not a.numel():
        return a.shape == b.shape
    scale = a.abs().max().item() if scale is None else scale
    return bool((a - b).abs().max() <= TOLERANCE * scale + 1e-30)


@contextmanager
def _random_state_restored() -> Iterator[Callable[[], bool]]:
    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]

    with torch.random.fork_rng():
        before = states()
        yield lambda: any(not torch.equal(a, b) for a, b in zip(before, states(), strict=True))
