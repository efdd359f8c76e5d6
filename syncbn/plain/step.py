"""A training step of BatchNorm in plain operators, which autograd and torch.func differentiate to any order.

Slower than `ops.autograd`, and more general: it serves masks, torch.func (grad, vjp, jvp, vmap) and forward-mode AD.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..ops.checks import check_input
from ..ops.reference import Running
from .batch import join


def plain_step(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running,
    eps: float,
    group: ProcessGroup | None,
    name: str,
    num_features: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Do what `ops.autograd.train_step` does, with the same arguments; with a mask w over valid positions only.

    ``n = sum(w)``, ``mean = sum(w * x) / n`` and ``var = sum(w * x**2) / n - mean**2`` over all ranks, and y is 0
    where w is 0. One exchange of 2C + 1 numbers forward, and one backward. Errors: see `functional.sync_batch_norm`.
    """
    check_input(x, weight, running.mean, eps, num_features)
    batch = join(x, eps, running.momentum, group, name, mask)
    batch.move(running)
    mean, var = batch.mean_var()
    invstd = torch.rsqrt(var + eps)
    return batch.scale(mean, invstd if weight is None else invstd * weight, bias)
