"""Normalize a batch that is spread over ranks: the layer as a function."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .distributed.exchange import group_of
from .distributed.groups import GroupSpec, ProcessGroupLike
from .ops.autograd import train_step
from .ops.checks import check_input
from .ops.reference import Running
from .private import running_backward


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    process_group: ProcessGroupLike | GroupSpec = None,
) -> Tensor:
    """Normalize ``input`` with the statistics of the batch on all ranks of ``process_group``.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias`` per channel, equal to ``F.batch_norm`` of the ranks' inputs
    joined, for any split, uneven and empty ones included. Ioffe & Szegedy 2015, algorithm 1; Peng et al. 2018
    (MegDet), section 3.3.

    Collectives: in training, one exchange of 2C + 1 float64 numbers forward, and one of 2C backward if ``input``
    requires a gradient (which must be so on all ranks or on none). None if ``training`` is False, without a process
    group, or in a group of one: then this is ``F.batch_norm``.

    Args:
        input: ``(N, C, *)`` of float16, bfloat16, float32 or float64, the same dtype on every rank; N may be 0.
        running_mean: ``(C,)`` or None; updated in place in training.
        running_var: ``(C,)`` or None; updated in place in training, with the unbiased variance.
        weight: ``(C,)`` or None for 1.
        bias: ``(C,)`` or None for 0.
        training: Whether to use, and exchange, the statistics of the batch.
        momentum: Part of the batch in the new running statistics; a tensor is not read back to the host.
        eps: Added to the variance under the root.
        process_group: None for all ranks, a number of consecutive ranks, "node", a ProcessGroup or a DeviceMesh.

    Returns a tensor of the shape, dtype and memory format of ``input``.

    Raises:
        ValueError: If ``input`` has another shape or dtype than stated (half types go with float32 parameters too),
            or a device without float64; if ``eps`` is not positive in training; on every rank alike, if all ranks
            together have one value per channel.
    """
    check_input(input, weight, running_mean, eps if training else None)
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps)
    spec = process_group if isinstance(process_group, GroupSpec) else GroupSpec(process_group)
    group, running = group_of(spec, "sync_batch_norm"), Running(running_mean, running_var, None, momentum)
    if group is None:
        return one_process(input, weight, bias, running, eps)
    return train_step(input, weight, bias, running, eps, group, "sync_batch_norm")


def one_process(x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running, eps: float) -> Tensor:
    """Do a training step where there is nothing to exchange, by ``F.batch_norm``; nothing is read back to the host."""
    running_mean, running_var, num_batches_tracked, momentum = running
    if not torch.compiler.is_compiling() and running_backward() != -1:
        momentum = 0.0  # a recomputation: the first pass has moved them
    elif num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if momentum is None:
        momentum = 0.0 if num_batches_tracked is None else 1.0 / num_batches_tracked.double()
    if not isinstance(momentum, Tensor) or running_mean is None or running_var is None:
        factor = 0.0 if isinstance(momentum, Tensor) else momentum
        return F.batch_norm(x, running_mean, running_var, weight, bias, True, factor, eps)
    # F.batch_norm takes a number: let it write the batch's own statistics, and average with the tensor.
    mean, var = running_mean.clone(), running_var.clone()
    y = F.batch_norm(x, mean, var, weight, bias, True, 1.0, eps)
    with torch.no_grad():
        running_mean.lerp_(mean, momentum.to(mean.dtype))
        running_var.lerp_(var, momentum.to(var.dtype))
    return y
