"""Make process groups: those of all specs in use that are an int or "node", those of meshes, and twins beside DDP.

Making a group is a collective of the whole world, and a different order on another rank deadlocks. So specs declare
themselves, and the first one that needs a group makes those of all, declared on any rank, in one sorted order. Groups
of meshes and twins are made by their own ranks alone, which come to them in one order.
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
from ..private import active_ddp, backend_name, group_of_members, known_groups, timeout_of

declared: "weakref.WeakValueDictionary[int | str, Any]" = weakref.WeakValueDictionary()  # specs in use, by value
_groups: dict[int | str, Any] = {}  # a ProcessGroup, "world", None in a group of one, or the ValueError to raise
_world_of_groups: "list[weakref.ref[ProcessGroup]]" = []  # weak: torch may abort at exit over a group that is left

# By group, the groups made beside it, by their ranks; weak for the same reason.
_beside: "weakref.WeakKeyDictionary[ProcessGroup, dict[tuple[int, ...], Any]]" = weakref.WeakKeyDictionary()


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
    if not (_world_of_groups and _world_of_groups[0]() is dist.group.WORLD and value in _groups):
        _make_groups()
    group: ProcessGroup | ValueError | None = dist.group.WORLD if _groups[value] == "world" else _groups[value]
    if isinstance(group, ValueError):
        raise group
    return group


def _make_groups() -> None:
    """Make the groups of every spec declared on any rank; each rank keeps those it is in."""
    world = dist.group.WORLD
    assert world is not None
    everyone = _gather_json([list(declared), socket.gethostname()])
    if not (_world_of_groups and _world_of_groups[0]() is world):
        _groups.clear()
        _world_of_groups[:] = [weakref.ref(world, lambda _: _groups.clear())]
    hosts = [host for _, host in everyone]
    wanted = set().union(*(declared for declared, _ in everyone)) - _groups.keys()
    for value in sorted(wanted, key=lambda v: (isinstance(v, str), v)):
        _groups[value] = _make_groups_of(value, hosts)


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


def _make_groups_of(value: int | str, hosts: list[str]) -> Any:
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


def group_of_mesh(mesh: Any) -> ProcessGroup | None:
    """Return the group of all ranks of a DeviceMesh of several dimensions, made before or now."""
    world, ranks = dist.group.WORLD, tuple(sorted(mesh.mesh.flatten().tolist()))
    return world if world is None or len(ranks) == world.size() else _made_beside(world, ranks, "all ranks of a mesh")


def apart_from_ddp(group: ProcessGroup) -> ProcessGroup:
    """Return a twin of ``group``, of the same ranks, where DDP reduces gradients in ``group`` itself.

    DDP reduces a bucket once its gradients exist. Where the graphs of ranks differ (parameters unused on some), that
    is before an exchange on one rank and after it on another: a deadlock, in one group. The twin is made in the first
    training forward of such a DDP module, and used from then on. Except on gloo, where it costs next to nothing, only
    a module that is told of such graphs has one.
    """
    ddp = active_ddp()
    may_differ = ddp is not None and (ddp.find_unused_parameters or ddp.static_graph or backend_name(group) == "gloo")
    ranks = tuple(dist.get_process_group_ranks(group))
    if (may_differ and ddp.process_group is group) or ranks in _beside.get(group, ()):
        return _made_beside(group, ranks, "twin")
    return group


def apart_in_graph(name: str) -> ProcessGroup | None:
    """Return `apart_from_ddp` of the group of a name, all that is known while torch.compile traces; None if unknown."""
    group = next((group for group in known_groups() or () if group.group_name == name), None)
    return None if group is None else apart_from_ddp(group)


def _made_beside(group: ProcessGroup, ranks: tuple[int, ...], what: str) -> ProcessGroup:
    made = _beside.setdefault(group, {})
    found: ProcessGroup | None = made[ranks]() if ranks in made else None
    if found is None:
        found = group_of_members(ranks, what, group)
        made[ranks] = weakref.ref(found)
    return found


# As torch.compiler.assume_constant_result: made while torch.compile traces, not in the graph.
for _function in (group_made_of, group_of_mesh, apart_in_graph):
    setattr(_function, "_dynamo_marked_constant", True)  # noqa: B010  # mypy knows no such attribute
