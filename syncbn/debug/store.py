"""A notice board in the store of the process group: rows that ranks write for each other beside all collectives.

The store answers while a collective hangs, and when ranks are dead: a file, or a process (torchrun's agent, or rank 0)
that others reach by TCP. It knows nothing of the backend, so a row arrives under NCCL as under gloo.

A rank's operations run in a thread of its own, in order: a store whose process stands still blocks that thread and not
the caller, who waits no longer than he said.
"""

import threading
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from ..private import default_store

GAVE_UP = b"gave up"  # the row of a rank that has waited too long: who comes later must not go on alone
_GRACE = 5.0  # seconds beyond a time-out that the store may take to answer


class BoardError(RuntimeError):
    """The store is not there, or does not answer."""


@dataclass(frozen=True)
class Meeting:
    """What the ranks of a group wrote for one call, by global rank, and where those who did not come were last."""

    rows: dict[int, bytes]
    places: dict[int, str] = field(default_factory=dict)  # "" of a rank that has written nothing


class Board:
    """The board of one world. Every method but the constructor may be called by one thread at a time."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self._calls: Counter[str] = Counter()  # by name of the group
        self._jobs: SimpleQueue[Callable[[_Pen], None] | None] = SimpleQueue()
        pen = _Pen(_default_store(), self.rank)
        threading.Thread(target=_work, args=(self._jobs, pen), name="syncbn order check", daemon=True).start()
        weakref.finalize(self, self._jobs.put, None).atexit = False

    def next_call(self, group: ProcessGroup) -> int:
        """Count the calls of ``group`` on this rank, from 0."""
        self._calls[group.group_name] += 1
        return self._calls[group.group_name] - 1

    def meet(self, group: ProcessGroup, call: int, row: bytes, place: str, timeout: float) -> Meeting:
        """Write this rank's ``row`` of one call, and wait for those of the others, ``timeout`` seconds at most.

        Per rank one write and one read; the row of the call before is deleted while the caller goes on.

        Raises:
            BoardError: If there is no answer from the store.
        """
        ranks, answer = dist.get_process_group_ranks(group), SimpleQueue[Meeting | Exception]()
        name, index = group.group_name, dist.get_rank(group)
        self._jobs.put(lambda pen: pen.meet(answer, name, call, index, ranks, row, place, timeout))
        try:
            found = answer.get(timeout=timeout + _GRACE)
        except Empty:
            raise BoardError(f"it has not answered for {timeout + _GRACE:g} s") from None
        if isinstance(found, Exception):
            raise BoardError(f"{type(found).__name__}: {str(found).splitlines()[0]}") from found
        return found

    def note(self, place: str) -> None:
        """Write where this rank is, and do not wait."""
        self._jobs.put(lambda pen: pen.note(place))


def current_board() -> Board:
    """Return the board of the present world.

    Raises:
        BoardError: If its process group has no store.
    """
    world = dist.group.WORLD
    assert world is not None
    if world not in _boards:
        _boards[world] = Board()
    return _boards[world]


def is_initialized() -> bool:
    """Whether there is a process group, and so a board."""
    return dist.is_available() and dist.is_initialized()


def rank_in_world() -> int:
    """Return this process's rank; -1 if its process group is gone."""
    return dist.get_rank() if is_initialized() else -1


def ranks_of(group: ProcessGroup) -> list[int]:
    """Return the global ranks of ``group`` in the order of its own."""
    return dist.get_process_group_ranks(group)


_boards: "weakref.WeakKeyDictionary[ProcessGroup, Board]" = weakref.WeakKeyDictionary()


class _Pen:
    """The operations on the store, all in the board's thread."""

    def __init__(self, store: Any, rank: int) -> None:
        self.store, self.rank = store, rank
        self.shares_timeout, self.is_open = True, False  # the time-out, with the other users of the store
        self.prefixes: dict[str, str] = {}  # by group
        self.previous: dict[str, str] = {}  # row of the last call, by group

    def open(self) -> None:
        """Take a connection of our own, since a read that waits holds it, and forget where an earlier world was."""
        if self.is_open:
            return
        self.is_open = True
        before, shared = self.store.timeout, self.store
        with suppress(AttributeError, NotImplementedError, RuntimeError):
            self.store = shared.clone()
            self.store.set_timeout(before + timedelta(seconds=1))
            self.shares_timeout = shared.timeout != before  # a HashStore's clone is itself
            self.store.set_timeout(before)
        self.store.set(_last(self.rank), "")

    def prefix_of(self, group: str) -> str:
        """Give keys of a group that no earlier one of its name has used: process groups made anew may share a store.

        Each rank counts the groups of this name that it has met, which all members have.
        """
        if group not in self.prefixes:
            number = self.store.add(f"syncbn/order/groups/{group}/{self.rank}", 1)
            self.prefixes[group] = f"syncbn/order/{group}/{number}"
        return self.prefixes[group]

    def note(self, place: str) -> None:
        self.open()
        self.store.set(_last(self.rank), place)

    def meet(
        self, answer: Any, group: str, call: int, index: int, ranks: list[int], row: bytes, place: str, timeout: float
    ) -> None:
        try:
            self.open()
            keys = [f"{self.prefix_of(group)}/{call}/{i}" for i in range(len(ranks))]
            self.store.multi_set([keys[index], _last(self.rank)], [row, place])
            rows = self._read(keys, timeout)
            found = self._absent(keys, index, ranks) if rows is None else Meeting(dict(zip(ranks, rows, strict=True)))
        except Exception as error:  # of any kind: the caller waits for an answer
            answer.put(error)
            return
        answer.put(found)
        if rows is not None:  # all have come here, so all have read the call before
            if group in self.previous:
                self.store.delete_key(self.previous[group])
            self.previous[group] = keys[index]

    def _read(self, keys: list[str], timeout: float) -> list[bytes] | None:
        """Read all rows, None if one is not there in time (or the store is not: whoever asks next sees that)."""
        limit = timedelta(seconds=timeout)
        try:
            if self.shares_timeout:
                self.store.wait(keys, limit)
            elif self.store.timeout != limit:
                self.store.set_timeout(limit)
            rows: list[bytes] = self.store.multi_get(keys)
        except RuntimeError:
            return None
        return rows

    def _absent(self, keys: list[str], index: int, ranks: list[int]) -> Meeting:
        come = {rank: self.store.check([key]) for rank, key in zip(ranks, keys, strict=True)}
        if all(come.values()):  # the last one just now
            return Meeting(dict(zip(ranks, self.store.multi_get(keys), strict=True)))
        self.store.set(keys[index], GAVE_UP)
        places = {}
        for rank in [rank for rank in ranks if not come[rank]]:
            key = _last(rank)
            places[rank] = self.store.get(key).decode() if self.store.check([key]) else ""
        return Meeting({}, places)


def _last(rank: int) -> str:
    return f"syncbn/order/last/{rank}"


def _work(jobs: "SimpleQueue[Callable[[_Pen], None] | None]", pen: _Pen) -> None:
    while (job := jobs.get()) is not None:
        with suppress(Exception):  # nobody waits any more: the next meeting says what is wrong with the store
            job(pen)


def _default_store() -> Any:
    try:
        store = default_store()
    except (AttributeError, KeyError) as error:
        raise BoardError(f"this torch does not give it away ({error})") from error
    if store is None:
        raise BoardError(f"the backend {dist.get_backend()!r} has none")
    return store
