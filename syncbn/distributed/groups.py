"""Which ranks take part in an exchange.

A *spec* says which ranks share their statistics; a group is made from it late, since models are built, copied and
pickled where no process group exists yet. Making a group is a collective of the whole world: a different order on
another rank deadlocks. So every spec declares itself when it is made, and the first one that needs a group makes
those of all declared specs, of all ranks, in one sorted order.
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
from torch.distributed.device_mesh import DeviceMesh

from ..compat import all_gather_single
from ..private import known_groups, timeout_of

ProcessGroupLike = None | int | str | ProcessGroup | DeviceMesh

_BY_SIZE_OR_NAME = (int, str)  # groups that are made here; a tuple, as torch 2.6 traces no `int | str`
_IS_AVAILABLE = dist.is_available()
_declared: "weakref.WeakValueDictionary[int | str, GroupSpec]" = weakref.WeakValueDictionary()  # those in use
_made: dict[int | str, ProcessGroup | ValueError | None] = {}
_made_in: list[ProcessGroup] = []  # the world that _made belongs to


class GroupSpec:
    """Which ranks share their statistics. Immutable; copies share it, and it pickles without a process group.

    Args:
        value: None for the world, an int for groups of that many consecutive ranks, ``"node"`` for the ranks of
            equal host name, a ProcessGroup, or a DeviceMesh of one dimension.

    Raises:
        ValueError: If ``value`` is none of these, or a ProcessGroup that this rank is not in.
    """

    value: ProcessGroupLike
    ranks: tuple[int, ...] | None  # of a ProcessGroup, which may be gone by the time they are asked for

    def __new__(cls, value: ProcessGroupLike) -> "GroupSpec":
        """Return the one spec of an int or "node", so that it is declared as long as any layer has it."""
        _check_spec(value)
        spec = _declared.get(value) if isinstance(value, _BY_SIZE_OR_NAME) else None
        if spec is None:
            spec = super().__new__(cls)
            spec.value = value
            spec.ranks = tuple(dist.get_process_group_ranks(value)) if isinstance(value, ProcessGroup) else None
            if isinstance(value, _BY_SIZE_OR_NAME):
                _declared[value] = spec
        return spec

    @property
    def is_subgroup(self) -> bool:
        """Whether statistics may differ between groups of ranks."""
        return self.value is not None or self.ranks is not None

    def resolve(self) -> ProcessGroup | None:
        """Find the process group, or None where there is nothing to exchange: no process group, or a group of one.

        The first call that needs a group of an int or ``"node"`` makes the groups of all declared specs, which is
        a collective of the whole world.

        Raises:
            ValueError: If an int does not divide the world size; if the process group is gone, or, after unpickling,
                no group of its ranks exists.
        """
        if not (_IS_AVAILABLE and dist.is_initialized()):  # torch 2.6 does not trace `dist.group.WORLD is None`
            return None
        if self.ranks is not None:
            group = self.value if isinstance(self.value, ProcessGroup) else None
            if group is None or not (torch.compiler.is_compiling() or _exists(group)):
                group = _find_group(self.ranks)
        elif self.value is None:
            group = dist.group.WORLD
        elif isinstance(self.value, _BY_SIZE_OR_NAME):
            group = _made_group(self.value)
        else:
            assert isinstance(self.value, DeviceMesh)
            group = self.value.get_group()
        return None if group is None or group.size() == 1 else group

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GroupSpec) and (self.value, self.ranks) == (other.value, other.ranks)

    def __hash__(self) -> int:
        return hash((self.value, self.ranks))

    def __deepcopy__(self, memo: dict[int, Any]) -> "GroupSpec":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (GroupSpec, (self.value,)) if self.ranks is None else (_spec_of_ranks, (self.ranks,))

    def __repr__(self) -> str:
        return repr(self.value) if self.ranks is None else f"ranks {list(self.ranks)}"


def _spec_of_ranks(ranks: tuple[int, ...]) -> GroupSpec:
    """Unpickle the spec of a ProcessGroup, which is found again when it is needed."""
    spec = object.__new__(GroupSpec)
    spec.value, spec.ranks = None, ranks
    return spec


def make_groups(specs: Iterable[GroupSpec]) -> None:
    """Make the groups of ``specs`` now, if torch.distributed is initialized: then a collective of the world.

    Whether it communicates depends on ``specs`` alone, which all ranks share, not on what else a rank has declared.

    Raises:
        ValueError: If an int does not divide the world size.
    """
    values = {spec.value for spec in specs if isinstance(spec.value, _BY_SIZE_OR_NAME)}
    if not (values and dist.is_available() and dist.is_initialized()):
        return
    if not _is_made(values):
        _make_groups()
    for value in values:
        _made_group(value)


def check_size(size: int, world_size: int) -> None:
    """Raise a ValueError that lists the choices, if groups of ``size`` ranks do not fill the world."""
    if world_size % size and world_size > 1:
        choices = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise ValueError(
            f"process_group={size}: expected a number of ranks that divides the world size {world_size}; "
            f"choose one of {choices}."
        )


def _check_spec(value: ProcessGroupLike) -> None:
    if dist.is_available() and value is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group: expected a group that this rank is in, got one that it is not a member of.")
    if isinstance(value, ProcessGroup) and dist.get_rank(value) < 0:
        ranks, rank = dist.get_process_group_ranks(value), dist.get_rank()
        raise ValueError(f"process_group: expected a group that rank {rank} is in, got one of the ranks {ranks}.")
    if isinstance(value, DeviceMesh) and value.ndim != 1:
        names = value.mesh_dim_names
        raise ValueError(
            f"process_group: expected a DeviceMesh of one dimension, got {value.ndim} dimensions {names or ''}; "
            "give one of them, as in mesh['data']."
        )
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return
    if not (value is None or value == "node" or isinstance(value, (ProcessGroup, DeviceMesh))):
        raise ValueError(
            "process_group: expected None (all ranks), a number of consecutive ranks (1 or more), 'node', "
            f"a ProcessGroup or a DeviceMesh, got {value!r}."
        )


def _made_group(value: int | str) -> ProcessGroup | None:
    if not _is_made({value}):
        _make_groups()
    group = _made[value]
    if isinstance(group, ValueError):
        raise group
    return group


def _is_made(values: set[Any]) -> bool:
    return bool(_made_in) and _made_in[0] is dist.group.WORLD and all(value in _made for value in values)


def _make_groups() -> None:
    """Make the groups of every spec declared on any rank; each rank keeps those it is in."""
    world = dist.group.WORLD
    assert world is not None
    everyone = _gather_json([list(_declared), socket.gethostname()])
    if not (_made_in and _made_in[0] is world):
        _made.clear()
        _made_in[:] = [world]
    hosts = [host for _, host in everyone]
    wanted = set().union(*(declared for declared, _ in everyone)) - _made.keys()
    for value in sorted(wanted, key=lambda v: (isinstance(v, str), v)):
        _made[value] = _make_groups_of(value, hosts)


def _gather_json(mine: Any) -> list[Any]:
    """Gather a JSON value of every rank of the world, in order: two collectives, of sizes and of texts.

    Not all_gather_object, which unpickles, and so runs, what other ranks send.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    text = torch.tensor(list(json.dumps(mine).encode()), dtype=torch.uint8, device=device)
    sizes = torch.empty(dist.get_world_size(), dtype=torch.int64, device=device)
    all_gather_single(sizes, torch.tensor([len(text)], device=device))
    longest = int(sizes.max())
    texts = text.new_empty(len(sizes) * longest)
    all_gather_single(texts, F.pad(text, (0, longest - len(text))))
    rows = zip(texts.view(-1, longest).tolist(), sizes.tolist(), strict=True)
    return [json.loads(bytes(row[:size])) for row, size in rows]


def _make_groups_of(value: int | str, hosts: list[str]) -> ProcessGroup | ValueError | None:
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
        return dist.group.WORLD
    mine = None
    for part in parts:  # every rank makes every group, in the same order
        group = dist.new_group(part, timeout=timeout_of(dist.group.WORLD)) if len(part) > 1 else None
        mine = group if rank in part else mine
    assert not isinstance(mine, int)
    return mine


def _exists(group: ProcessGroup) -> bool:
    groups = known_groups()
    return groups is None or group in groups


def _find_group(ranks: tuple[int, ...]) -> ProcessGroup | None:
    if len(ranks) == 1 or dist.get_world_size() == 1:
        return None
    groups: list[ProcessGroup | None] = [dist.group.WORLD, *(known_groups() or ())]
    for group in groups:
        if group is not None and tuple(dist.get_process_group_ranks(group)) == ranks:
            return group
    raise ValueError(
        f"process_group: this layer has the group of the ranks {list(ranks)}, and no such group exists (any more). "
        "Make it with torch.distributed.new_group on every rank, or set layer.process_group."
    )


# What torch.compiler.assume_constant_result does, without the second it takes to import the compiler: groups are
# made and found while torch.compile traces, not in the graph.
for _function in (_made_group, _find_group):
    setattr(_function, "_dynamo_marked_constant", True)  # noqa: B010  # mypy knows no such attribute
