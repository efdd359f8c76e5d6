"""Make process groups: those of an int or "node" for all specs in use, those of meshes, and twins of DDP's.

Making a group is a collective of the whole world, and a different order on another rank deadlocks. So specs declare
themselves, and the first one that needs a group makes those of all, declared on any rank, in one sorted order. Meshes
and twins are met by all their ranks in one order, and made by these alone.
"""

import json
import socket
import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed import ProcessGroup

from ..compat import all_gather_single
from ..private import active_ddp, backend_name, group_named, group_of_members, timeout_of

observer: Any = None  # called before every exchange, and may raise: the order check of `syncbn.debug`
declared: "weakref.WeakValueDictionary[int | str, Any]" = weakref.WeakValueDictionary()  # specs in use, by value
# By group, what was made beside it, weakly: torch may abort at exit over a group that is left. By ranks a twin, or the
# group of a mesh; of the world by int or "node" a ProcessGroup, "world", None for a group of one, or a ValueError.
_made: "weakref.WeakKeyDictionary[ProcessGroup, dict[Any, Any]]" = weakref.WeakKeyDictionary()


def make_groups(specs: Iterable[Any]) -> None:
    """Make the groups of ``specs`` now, if torch.distributed is initialized: then a collective of the world.

    Whether it communicates depends on ``specs`` alone, which all ranks share. ValueError: see `check_size`.
    """
    values = {spec.value for spec in specs if isinstance(spec.value, (int, str))}
    if not (values and dist.is_available() and dist.is_initialized()):
        return
    for value in sorted(values, key=str):
        group_made_of(value)


def check_size(size: int, world_size: int) -> None:
    """Raise a ValueError that lists the choices, if groups of ``size`` ranks do not fill the world."""
    if world_size % size and world_size > 1:
        choices = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise ValueError(
            f"process_group={size}: expected a number of ranks that divides the world size {world_size}; "
            f"choose one of {choices}."
        )


def group_made_of(value: int | str) -> ProcessGroup | None:
    """Return this rank's group of an int or "node", made before or now; None in a group of one."""
    world: Any = dist.group.WORLD
    made = _made.setdefault(world, {})
    if value not in made:
        _make_groups(made)
    group: ProcessGroup | ValueError | None = world if made[value] == "world" else made[value]
    if isinstance(group, ValueError):
        raise group
    return group


def _make_groups(made: dict[Any, Any]) -> None:
    """Make the groups of every spec declared on any rank; each rank keeps those it is in."""
    specs, hosts = zip(*_gather_json([list(declared), socket.gethostname()]), strict=True)
    for value in sorted(set().union(*specs) - made.keys(), key=lambda v: (isinstance(v, str), v)):
        made[value] = _make_groups_of(value, hosts)


def _gather_json(mine: Any) -> list[Any]:
    """Gather a JSON value of every rank, by two collectives; all_gather_object would unpickle, and so run it."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    text = torch.tensor(list(json.dumps(mine).encode()), dtype=torch.uint8, device=device)
    sizes = torch.empty(dist.get_world_size(), dtype=torch.int64, device=device)
    all_gather_single(sizes, torch.tensor([len(text)], device=device))
    longest = int(sizes.max())
    texts = text.new_empty(len(sizes) * longest)
    all_gather_single(texts, F.pad(text, (0, longest - len(text))))
    rows = zip(texts.view(-1, longest).tolist(), sizes.tolist(), strict=True)
    return [json.loads(bytes(row[:size])) for row, size in rows]


def _make_groups_of(value: int | str, hosts: tuple[str, ...]) -> Any:
    world_size, rank = len(hosts), dist.get_rank()
    if isinstance(value, str):
        parts = [[r for r in range(world_size) if hosts[r] == host] for host in sorted(set(hosts))]
    else:
        try:
            check_size(value, world_size)
        except ValueError as error:
            return error  # raised where a layer needs these groups
        parts = [list(range(start, start + value)) for start in range(0, world_size, value)]
    if len(parts) == 1:
        return "world"
    timeout = timeout_of(dist.group.WORLD)
    # every rank makes every group, in the same order
    groups = [dist.new_group(part, timeout=timeout) if len(part) > 1 else None for part in parts]
    return next((group for group, part in zip(groups, parts, strict=True) if rank in part), None)


def group_of_mesh(mesh: Any) -> ProcessGroup:
    """Return the group of all ranks of a DeviceMesh, made before or now; the world if these are all."""
    world: Any = dist.group.WORLD
    ranks = tuple(sorted(mesh.mesh.flatten().tolist()))
    return _made_beside(world, ranks, "all ranks of a mesh") if len(ranks) < world.size() else world


def twin_of(name: str) -> ProcessGroup | None:
    """Return the twin of a group, of the same ranks, if DDP reduces gradients in that very group, else None.

    DDP reduces a bucket once its gradients exist. Where the graphs of ranks differ (parameters unused on some), that
    is before an exchange on one rank and after it on another: in one group a deadlock. The twin is made in the first
    training forward of such a DDP module, and used from then on.
    """
    group, ddp = group_named(name), active_ddp()
    if group is None:
        return None
    may_cross = ddp is not None and ddp.process_group is group
    if may_cross and not (ddp.find_unused_parameters or ddp.static_graph):
        may_cross = backend_name(group) == "gloo"  # any graphs may differ, and there a group costs next to nothing
    ranks = tuple(dist.get_process_group_ranks(group))
    return _made_beside(group, ranks, f"twin of group {name}") if may_cross or ranks in _made.get(group, ()) else None


def _made_beside(group: ProcessGroup, ranks: tuple[int, ...], what: str) -> ProcessGroup:
    made = _made.setdefault(group, {})
    found: ProcessGroup | None = made[ranks]() if ranks in made else None
    if found is None:
        if observer is not None and len(ranks) == group.size():
            observer.before_exchange(group, 0, f"the {what}", "about to be made", ())
        found = group_of_members(ranks, group, what)
        made[ranks] = weakref.ref(found)
    return found


# As torch.compiler.assume_constant_result: made while torch.compile traces, not in the graph.
for _function in (group_made_of, group_of_mesh, twin_of):
    setattr(_function, "_dynamo_marked_constant", True)  # noqa: B010  # mypy knows no such attribute
