"""One sum over the ranks of a process group: which group, which collective, and an observer called before it."""

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..compat import all_gather_single
from ..private import active_ddp, all_reduce_in_graph, backend_name, backend_name_in_graph, gather_in_graph
from . import subgroups
from .groups import GroupSpec, current_world, rank_in_world

Facts = tuple[Any, ...]  # for the observer: the input, whether it needs a gradient, eps, momentum
_GATHER_BYTES = 2**20  # that a rank receives: above, all_reduce moves less

_HINT = "Where the others were, SYNCBN_CHECK_ORDER=1 shows in the next run (see syncbn.debug)."


def observe(observer: Any) -> Any:
    """Call ``observer`` before all exchanges of this process; return the one so far."""
    before, subgroups.observer = subgroups.observer, observer
    return before


def note_eval(name: str) -> None:
    """Report to the observer, if there is one, that a layer runs in eval mode, without an exchange."""
    if subgroups.observer is not None and not torch.compiler.is_compiling():
        subgroups.observer.note_eval(name)


def group_of(spec: GroupSpec, name: str) -> ProcessGroup | None:
    """Find the process group of ``spec``, None where there is nothing to exchange; see `GroupSpec.resolve`.

    In the forward pass of DDP it may be a twin, see `twin_of`; outside of any, as in a recomputation, it is the last.
    """
    world = None if torch.compiler.is_compiling() else current_world()
    if world is not None:
        (found, found_in, found_by), ddp = spec.found, active_ddp()
        if found_in() is world and (ddp is None or found_by() is ddp) and (group := found()) is not None:
            return group
    try:
        group = spec.resolve()
        group = None if group is None else subgroups.twin_of(group.group_name) or group
    except RuntimeError as error:
        if str(error).startswith("syncbn: "):  # of the observer
            raise
        raise explain(error, name, "when the process groups were made") from error
    if group is not None and world is not None and spec.ranks is None:  # a ProcessGroup can be destroyed by itself
        spec.found = weakref.ref(group), weakref.ref(world), found_by if ddp is None else weakref.ref(ddp)
    return group


def all_reduce(packed: Tensor, group: ProcessGroup | None, name: str, direction: str, facts: Facts = ()) -> Tensor:
    """Sum ``packed``, ``(n,)``, over the ranks of ``group``: one collective, which may overwrite it.

    On gloo small buffers are gathered, and added up here in one order: half the network's delays, and the same bits on
    all machines of one kind. Which collective it is depends on the group and the size alone, so that a rank whose
    torch.compile gave up agrees with the others. What the backend raises is raised again, as the same class, with
    ``name`` (of the layer), ``direction`` (such as "forward") and rank.
    """
    if group is None:
        return packed
    num_ranks = group.size()
    is_small = packed.numel() * num_ranks <= _GATHER_BYTES // 8
    if torch.compiler.is_compiling():  # torch 2.6: in a backward pass, dynamo knows no packed.is_cpu
        if is_small and packed.device.type == "cpu" and backend_name_in_graph(group) == "gloo":
            return gather_in_graph(packed, group).view(num_ranks, -1).sum(0)
        return all_reduce_in_graph(packed, group)
    if subgroups.observer is not None:
        subgroups.observer.before_exchange(group, packed.numel(), name, direction, facts)
    try:
        if not packed.is_cpu:
            dist.all_reduce(packed, group=group)
            return packed
        if not (is_small and backend_name(group) == "gloo"):
            group.allreduce([packed]).wait()  # what dist.all_reduce does, in half the time
            return packed
        gathered = packed.new_empty(num_ranks * packed.numel())  # flat, as gloo wants it
        all_gather_single(gathered, packed, group)
        return gathered.view(num_ranks, -1).sum(0)
    except RuntimeError as error:
        raise explain(error, name, direction) from error


class DifferentiableSum(torch.autograd.Function):
    """`all_reduce`, with its arguments, whose gradient is again a sum over the ranks: each rank uses the result."""

    @staticmethod
    def forward(packed: Tensor, group: ProcessGroup, name: str, direction: str, facts: Facts) -> Tensor:
        return all_reduce(packed.detach().clone(), group, name, direction, facts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.group, ctx.name, direction, ctx.facts = inputs
        ctx.direction = "backward" if direction.startswith("forward") else "second-order backward"

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # it copies dy, which belongs to autograd and must not be overwritten
        return DifferentiableSum.apply(dy, ctx.group, ctx.name, ctx.direction, ctx.facts), None, None, None, None


def explain(error: Exception, name: str, direction: str) -> Exception:
    """Return an error of the class of ``error`` that says where it was raised, and what to do."""
    hint = _HINT if subgroups.observer is None else subgroups.observer.hint
    text = f"{error}\nsyncbn: raised in the exchange of {name}, {direction}, on rank {rank_in_world()}. {hint}"
    try:
        return type(error)(text)
    except Exception:  # its class wants something else
        return RuntimeError(text)
