"""Make the process groups of all specs in use: those of an int or "node".

Making a group is a collective of the whole world, and a different order on another rank deadlocks. So specs declare
themselves, and the first one that needs a group makes those of all, declared on any rank, in one sorted order.
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
from ..private import timeout_of

declared: "weakref.WeakValueDictionary[int | str, Any]" = weakref.WeakValueDictionary()  # specs in use, by value
_groups: dict[int | str, Any] = {}  # a ProcessGroup, "world", None in a group of one, or the ValueError to raise
_world_of_groups: "list[weakref.ref[ProcessGroup]]" = []  # weak: torch may abort at exit over a group that is left


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


# As torch.compiler.assume_constant_result: made while torch.compile traces, not in the graph.
setattr(group_made_of, "_dynamo_marked_constant", True)  # noqa: B010  # mypy knows no such attribute
