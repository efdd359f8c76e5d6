"""One sum over the ranks of a process group: which collective does it, and how it is started and awaited."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..compat import all_gather_single
from ..private import all_reduce_in_graph, backend_name, gather_in_graph


def all_reduce(packed: Tensor, group: ProcessGroup) -> Tensor:
    """Sum one packed buffer over the ranks of ``group``: one collective, of the kind that `Exchange` chooses.

    Where gradients must flow through the sum (second order), its gradient is again a sum over the ranks. Otherwise
    ``packed`` may be overwritten.
    """
    if packed.requires_grad:
        summed: Tensor = _Sum.apply(packed, group)
        return summed
    return Exchange(packed, group).wait()


class _Sum(torch.autograd.Function):
    """Sum over the ranks, whose gradient is the sum over the ranks of the gradients: each rank uses the result."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return Exchange(packed.clone(), group).wait()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(dy, ctx.group), None  # dy belongs to autograd: it must not be overwritten


class Exchange:
    """One sum over the ranks under way: the constructor starts it, `wait` returns it. ``packed`` may be overwritten.

    On gloo small buffers are gathered, and added up here in one order: the same bits on all machines of one kind.
    Which collective it is depends on the group and the size alone, so that a rank whose torch.compile gave up agrees
    with the others. torch.compile needs the functional collectives.
    """

    def __init__(self, packed: Tensor, group: ProcessGroup) -> None:
        self.work, self.shape = None, (group.size(), packed.numel())
        is_cpu = packed.device.type == "cpu"  # torch 2.6: in a backward pass, dynamo knows no packed.is_cpu
        self.gathers = packed.numel() <= gather_limit(group, is_cpu)
        if torch.compiler.is_compiling():
            self.result = gather_in_graph(packed, group) if self.gathers else all_reduce_in_graph(packed, group)
        elif self.gathers:
            self.result = packed.new_empty(group.size() * packed.numel())  # flat, as gloo wants it
            self.work = all_gather_single(self.result, packed, group, async_op=True)
        else:
            self.result = packed
            self.work = dist.all_reduce(packed, group=group, async_op=True)

    def wait(self) -> Tensor:
        """Return the sum."""
        if self.work is not None:
            self.work.wait()
        return self.result.view(self.shape).sum(0) if self.gathers else self.result


_GATHER_BYTES = 2**20  # that a rank receives: above, all_reduce moves less


def gather_limit(group: ProcessGroup, is_cpu: bool) -> int:
    """Return up to how many numbers a gather and a local sum is quicker: on gloo, half the network's delays."""
    return _GATHER_BYTES // 8 // group.size() if is_cpu and backend_name(group) == "gloo" else 0
