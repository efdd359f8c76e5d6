"""Normalize a batch that is spread over ranks: the layer as a function."""

from torch import Tensor

from .distributed.exchange import group_of
from .distributed.groups import GroupSpec, ProcessGroupLike
from .local import evaluate, one_process
from .ops.autograd import is_transformed, train_step
from .ops.checks import check_input
from .ops.reference import Running
from .plain.step import plain_step


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
    mask: Tensor | None = None,
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
        mask: Broadcastable to ``(N, 1, *)``: a bool, True where ``input`` is valid, or weights of 0 or more, of a
            floating dtype. Statistics, with ``n = sum(mask)`` values per channel, and gradients are those of the valid
            positions of all ranks, whatever the others hold; there the output is 0, in eval mode too.

    Returns a tensor of the shape, dtype and memory format of ``input``.

    Raises:
        ValueError: If ``input`` has another shape or dtype than stated (half types go with float32 parameters too),
            is sparse, nested or, in training or beside plain tensors, a DTensor, or on a device without float64; if
            ``eps`` is not positive in training; if ``mask`` has another shape, dtype or device, or needs a gradient;
            in training, on every rank alike, if all ranks together have one value per channel (a total weight in (0,
            1]), or a weight is negative or not finite.
    """
    check_input(input, weight, running_mean, eps if training else None)
    if not training:
        return evaluate(input, running_mean, running_var, weight, bias, eps, mask)
    spec = process_group if isinstance(process_group, GroupSpec) else GroupSpec(process_group)
    group, running = group_of(spec, "sync_batch_norm"), Running(running_mean, running_var, None, momentum)
    if group is None and mask is None:
        return one_process(input, weight, bias, running, eps)
    if mask is not None or is_transformed():
        return plain_step(input, weight, bias, running, eps, group, "sync_batch_norm", mask=mask)
    return train_step(input, weight, bias, running, eps, group, "sync_batch_norm")
