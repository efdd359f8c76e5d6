"""Private names of torch, looked up once, each with what is done where it is missing."""

import hashlib
import importlib.util
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from operator import methodcaller
from typing import Any

import torch
import torch.distributed as dist
import torch.utils._python_dispatch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .compat import all_gather_single

# Without these: plain operators, no C++ kernels.
are_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
num_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
# Without it: a mask is refused under vmap, by torch, which cannot read its count.
_functorch: Any = getattr(torch._C, "_functorch", None)
# Without it: forward-mode AD in training is refused by autograd, which knows no jvp of the step.
dual_level: Any = partial(getattr, torch.autograd.forward_ad, "_current_level", -1)
jit_tracing_state = getattr(torch._C, "_get_tracing_state", lambda: True)
_get_mode: Any = getattr(torch._C, "_get_dispatch_mode", None)
_recorders = getattr(getattr(torch._C, "_TorchDispatchModeKey", None), "__members__", {}).values()
# Without it: dispatch modes see the operators of Triton's interpreter.
_nothing = contextmanager(lambda: (None for _ in range(1)))
disable_modes: Any = getattr(torch.utils._python_dispatch, "_disable_current_modes", _nothing)
# Without it: a recomputation counts as a forward pass.
running_backward = getattr(torch._C, "_current_graph_task_id", lambda: -1)
# Without it, as in torch 2.6: a recomputation repeats the exchange.
top_saved_tensors_hooks: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", {}.get)  # None
# As in torch 2.6: then `save_memory` does nothing, since it could take what a checkpoint wants to save.
can_see_hooks = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
# Without it: a global count of 1 is not refused in a graph of torch.compile.
assert_in_graph = getattr(torch, "_assert_async", lambda *_: None)

# The name of a group's backend; the private look-up is quicker.
_has_backend_name = hasattr(dist.ProcessGroup, "_get_backend_name")
backend_name: Any = methodcaller("_get_backend_name") if _has_backend_name else dist.get_backend
# The DDP module whose forward pass runs; None if there is none, or if that cannot be known.
_has_active_ddp = hasattr(DistributedDataParallel, "_active_ddp_module")
active_ddp: Any = partial(getattr, DistributedDataParallel if _has_active_ddp else None, "_active_ddp_module", None)
_get_backend: Any = getattr(dist.ProcessGroup, "_get_backend", None)
_c10d: Any = getattr(dist, "distributed_c10d", None)  # not in a torch without distributed
_has_world = hasattr(_c10d, "_world")  # looked up at each call: ranks that are threads have one each
_get_default_store = getattr(_c10d, "_get_default_store", None)
_NOTE = "syncbn: "
_new_group = getattr(_c10d, "_new_process_group_helper", None)
_has_functional = importlib.util.find_spec("torch.distributed._functional_collectives") is not None


def constant_in_graph(function: Any) -> Any:
    """Let torch.compile call a function while it traces; what `torch.compiler` has for it imports the compiler."""
    function._dynamo_marked_constant = True  # without it: a graph break, where the function warns
    return function


def is_traced() -> bool:
    """Whether operators are recorded to be run later, as by make_fx: a kernel's launch would be lost."""
    is_known = _get_mode is not None and len(_recorders) > 0
    if num_dispatch_modes() and not (is_known and all(_get_mode(key) is None for key in _recorders)):
        return True
    return jit_tracing_state() is not None


def without_vmap(number: Tensor) -> tuple[Tensor, ...]:
    """Return the numbers that a scalar stands for under torch.func.vmap, of all that is mapped; else the scalar."""
    if torch.compiler.is_compiling() or not hasattr(_functorch, "is_functorch_wrapped_tensor"):
        return (number,)
    while _functorch.is_functorch_wrapped_tensor(number):
        number = _functorch.get_unwrapped(number)
    return number.reshape(-1).unbind()


def backend_name_in_graph(group: Any) -> str:
    """Return `backend_name` where torch.compile traces, which does not know that function."""
    return group._get_backend_name() if _has_backend_name else dist.get_backend(group)


def known_groups() -> list[Any] | None:
    """Return all process groups there are, None if that cannot be known: then a pickled layer finds only the world."""
    return list(_c10d._world.pg_map) if _has_world else None


def group_named(name: str) -> Any:
    """Return the process group of a name, None if that cannot be known."""
    return next((group for group in known_groups() or () if group.group_name == name), None)


def timeout_of(group: Any) -> timedelta | None:
    """Read a group's time-out, which new groups do not inherit by themselves; None (torch's default) if unknown."""
    for device in ("cpu", "cuda") if _get_backend is not None else ():
        try:
            timeout: timedelta = _get_backend(group, torch.device(device)).options._timeout
        except (AttributeError, RuntimeError):
            continue
        return timeout
    return None


def group_of_members(ranks: tuple[int, ...], like: Any, what: str) -> Any:
    """Make a group of ``ranks``, with the backend and time-out of the group ``like``: a collective of these alone.

    torch names groups by a counter, which some ranks must not advance alone: later groups of all would deadlock. So
    only a group of all is made by torch's public function, and others have names of their own. Without the private
    names those too are made by it. ``what`` is for messages, see `note_of`.
    """
    timeout, backend, size = timeout_of(like), dist.get_backend(like), dist.get_world_size()
    options: dict[str, Any] = {"timeout": timeout, "group_desc": _NOTE + what}
    if len(ranks) == size or _new_group is None or not _has_world or timeout is None:
        return dist.new_group(list(ranks), backend=backend, use_local_synchronization=len(ranks) < size, **options)
    name = f"syncbn_{like.group_name}_{hashlib.sha1(repr(ranks).encode(), usedforsecurity=False).hexdigest()[:12]}"
    rank = ranks.index(dist.get_rank())
    group, _ = _new_group(len(ranks), rank, list(ranks), backend, default_store(), name, **options)
    _c10d._world.pg_group_ranks[group] = {rank: i for i, rank in enumerate(ranks)}
    return group


def note_of(group: Any) -> str:
    """Return what `group_of_members` was given for messages, "" for another group."""
    return str(getattr(group, "group_desc", "")).partition(_NOTE)[2]


def default_store() -> Any:
    """Return the store of the world, None if it has none; without the name, the order check says that it cannot run.

    Raises:
        AttributeError: Without the name.
    """
    if _get_default_store is None:
        raise AttributeError("torch.distributed.distributed_c10d has no _get_default_store")
    return _get_default_store()


def is_compiled(module: Any) -> bool:
    """Whether ``module.compile()`` was called; False if that cannot be known."""
    return getattr(module, "_compiled_call_impl", None) is not None


def input_check_of(cls: type[torch.nn.Module]) -> Any:
    """Return what checks an input's dimensions for a class of BatchNorm; without it any number is taken."""
    return getattr(cls, "_check_input_dim", lambda *_: None)


def joins(ddp: Any) -> bool:
    """Whether a DDP module runs under ``join()``; False if that cannot be known: then a rank waits for the others."""
    return bool(getattr(getattr(ddp, "_join_config", None), "enable", False))


def gather_in_graph(packed: Tensor, group: Any) -> Tensor:
    """Gather in a graph of torch.compile; without the functional collectives by the public one."""
    if not _has_functional:
        gathered = packed.new_empty(group.size() * packed.numel())
        all_gather_single(gathered, packed, group)
        return gathered
    from torch.distributed import _functional_collectives as functional

    gather: Any = getattr(functional, "all_gather_single", None)
    if gather is None:  # before torch 2.13; the operator, as 2.6 traces no assertion in a backward pass
        started = torch.ops._c10d_functional.all_gather_into_tensor(packed, group.size(), group.group_name)
        waited: Tensor = functional.wait_tensor(started)  # type: ignore[no-untyped-call]
        return waited
    result: Tensor = gather(packed, 0, group)
    return result


def all_reduce_in_graph(packed: Tensor, group: Any) -> Tensor:
    """Sum over the ranks in a graph of torch.compile; without the functional collectives by the public one."""
    if not _has_functional:
        dist.all_reduce(packed, group=group)
        return packed
    from torch.distributed import _functional_collectives as functional

    summed: Tensor = functional.all_reduce(packed, "sum", group)
    return summed


def checkpoint_frame() -> tuple[Any, bool]:
    """Find the innermost non-reentrant checkpoint, and whether this is its first pass; (None, False) if there is none.

    It is in the closure of the hook that packs saved tensors: ``frame``, or ``target_frame_ref`` in a recomputation.
    """
    hooks = top_saved_tensors_hooks(True)
    pack: Any = getattr(hooks[0], "__wrapped__", hooks[0]) if hooks else None
    if getattr(pack, "__module__", None) != "torch.utils.checkpoint":
        return None, False
    names = pack.__code__.co_freevars
    cells = dict(zip(names, (cell.cell_contents for cell in pack.__closure__ or ()), strict=True))
    if "frame" in cells:
        return cells["frame"], True
    reference = cells.get("target_frame_ref")
    return (reference() if reference is not None else None), False
