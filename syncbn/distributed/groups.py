"""Which ranks take part in an exchange.

A *spec* says which ranks share their statistics; a group is found or made from it late (`subgroups`), since models are
built, copied and pickled where no process group exists yet.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ..private import known_groups
from .subgroups import declared, group_made_of, group_of_mesh

ProcessGroupLike = None | int | str | ProcessGroup | DeviceMesh

_BY_SIZE_OR_NAME = (int, str)  # groups that are made here; a tuple, as torch 2.6 traces no `int | str`
_IS_AVAILABLE = dist.is_available()
ranks_of: Any = getattr(dist, "get_process_group_ranks", None)  # global ranks of a group, in the order of its own
_NOT_FOUND: Any = (lambda: None,) * 3
# Looked up at each call, since ranks that are threads have one each; quicker than a function of ours.
current_world: Callable[[], ProcessGroup | None] = partial(getattr, getattr(dist, "group", None), "WORLD", None)


class GroupSpec:
    """Which ranks share their statistics. Copies share it, and it pickles without a process group.

    ``value`` is None for the world, an int for groups of that many consecutive ranks, ``"node"`` for the ranks of
    equal host name, a ProcessGroup, or a DeviceMesh (all its ranks); a ValueError for anything else.
    """

    value: ProcessGroupLike
    ranks: tuple[int, ...] | None  # of a ProcessGroup, which may be gone by the time they are asked for
    found: tuple[Callable[[], ProcessGroup | None], Callable[[], Any], Callable[[], Any]]  # last group, world, DDP

    def __new__(cls, value: ProcessGroupLike) -> "GroupSpec":
        """Return the one spec of an int or "node", so that it is declared as long as any layer has it."""
        _check_spec(value)
        spec: GroupSpec | None = declared.get(value) if isinstance(value, _BY_SIZE_OR_NAME) else None
        if spec is None:
            spec = super().__new__(cls)
            spec.value, spec.found = value, _NOT_FOUND
            spec.ranks = tuple(ranks_of(value)) if isinstance(value, ProcessGroup) else None
            if isinstance(value, _BY_SIZE_OR_NAME):
                declared[value] = spec
        return spec

    @property
    def is_subgroup(self) -> bool:
        """Whether statistics may differ between groups of ranks."""
        return self.value is not None or self.ranks is not None

    def given(self) -> ProcessGroupLike:
        """Return the value; for a spec unpickled with a ProcessGroup, the group of its ranks."""
        return self.resolve() if self.value is None and self.ranks is not None else self.value

    def resolve(self) -> ProcessGroup | None:
        """Find the process group, or None where there is nothing to exchange: no process group, or a group of one.

        The first call for an int or ``"node"`` is a collective of the whole world, that for a mesh of several
        dimensions one of its ranks, see `subgroups`. Raises ValueError if an int does not divide the world size, or no
        group of a ProcessGroup's ranks exists.
        """
        if not (_IS_AVAILABLE and dist.is_initialized()):  # torch 2.6 does not trace `dist.group.WORLD is None`
            return None
        if self.ranks is not None:
            group = self.value if isinstance(self.value, ProcessGroup) else None
            is_known = torch.compiler.is_compiling() or group in (known_groups() or [group])
            if group is None or not is_known:
                group = _find_group(self.ranks)
        elif self.value is None:
            group = dist.group.WORLD
        elif isinstance(self.value, _BY_SIZE_OR_NAME):
            group = group_made_of(self.value)
        else:
            assert isinstance(self.value, DeviceMesh)
            group = self.value.get_group() if self.value.ndim == 1 else group_of_mesh(self.value)
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


def rank_in_world() -> int:
    """Return this process's rank; -1 without a process group."""
    return dist.get_rank() if _IS_AVAILABLE and dist.is_initialized() else -1


def _spec_of_ranks(ranks: tuple[int, ...]) -> GroupSpec:
    """Unpickle the spec of a ProcessGroup, which is found again when it is needed."""
    spec = object.__new__(GroupSpec)
    spec.value, spec.ranks, spec.found = None, ranks, _NOT_FOUND
    return spec


def _check_spec(value: ProcessGroupLike) -> None:
    if dist.is_available() and value is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group: expected a group that this rank is in, got one that it is not a member of.")
    if isinstance(value, ProcessGroup) and dist.get_rank(value) < 0:
        ranks, rank = ranks_of(value), dist.get_rank()
        raise ValueError(f"process_group: expected a group that rank {rank} is in, got one of the ranks {ranks}.")
    if isinstance(value, DeviceMesh) and value.get_coordinate() is None:
        raise ValueError(f"process_group: expected a DeviceMesh that rank {dist.get_rank()} is in, got {value}.")
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return
    if not (value is None or value == "node" or isinstance(value, (ProcessGroup, DeviceMesh))):
        raise ValueError(
            "process_group: expected None (all ranks), a number of consecutive ranks (1 or more), 'node', "
            f"a ProcessGroup or a DeviceMesh, got {value!r}."
        )


def _find_group(ranks: tuple[int, ...]) -> ProcessGroup | None:
    if len(ranks) == 1 or dist.get_world_size() == 1:
        return None
    for group in known_groups() or [dist.group.WORLD]:
        if tuple(ranks_of(group)) == ranks:
            return group  # type: ignore[no-any-return]
    raise ValueError(
        f"process_group: this layer has the group of the ranks {list(ranks)}, and no such group exists (any more). "
        "Make it with torch.distributed.new_group on every rank, or set layer.process_group."
    )


# What torch.compiler.assume_constant_result does, without the second it takes to import the compiler.
setattr(_find_group, "_dynamo_marked_constant", True)  # noqa: B010  # mypy knows no such attribute
