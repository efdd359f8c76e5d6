"""Rows that ranks write for each other in the store of the process group, beside all collectives.

The store answers while a collective hangs, and when ranks are dead: a file, or a process (torchrun's agent, or rank 0)
that others reach by TCP. It knows nothing of the backend, so a row arrives under NCCL as under gloo.

A rank's operations run in a thread of its own, in order: a store whose process stands still blocks that thread, and
the caller's wait is bounded by its time-out.
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

from torch.distributed import ProcessGroup

from ..distributed.groups import current_world, rank_in_world, ranks_of
from ..private import default_store

GAVE_UP = b"gave up"  # the row of a rank that has waited too long: who comes later must not go on alone
_GRACE = 5.0  # seconds beyond a time-out that the store may take to answer


class StoreError(RuntimeError):
    """There is no store, or it does not answer."""


@dataclass(frozen=True)
class Rendezvous:
    """What the ranks of a group wrote for one call, by global rank, and what those who did not come did last."""

    rows: dict[int, bytes]
    last: dict[int, str] = field(default_factory=dict)  # "" of a rank that has written nothing


class RankStore:
    """The rows of one world. Every method but the constructor may be called by one thread at a time."""

    def __init__(self) -> None:
        self.rank = rank_in_world()
        self._calls: Counter[str] = Counter()  # by name of the group
        self._jobs: SimpleQueue[Callable[[StoreClient], None] | None] = SimpleQueue()
        client = StoreClient(_default_store(), self.rank)
        threading.Thread(target=_work, args=(self._jobs, client), name="syncbn order check", daemon=True).start()
        weakref.finalize(self, self._jobs.put, None).atexit = False

    def next_call(self, group: ProcessGroup) -> int:
        """Count the calls of ``group`` on this rank, from 0."""
        self._calls[group.group_name] += 1
        return self._calls[group.group_name] - 1

    def meet(self, group: ProcessGroup, call: int, row: bytes, now: str, timeout: float) -> Rendezvous:
        """Write this rank's ``row`` of one call, and wait for those of the others, ``timeout`` seconds at most.

        Per rank one write and one read; the row of the call before is deleted while the caller goes on.

        Raises:
            StoreError: If there is no answer from the store.
        """
        ranks, answer = ranks_of(group), SimpleQueue[Rendezvous | Exception]()
        name, index = group.group_name, ranks.index(self.rank)
        self._jobs.put(lambda client: client.meet(answer, name, call, index, ranks, row, now, timeout))
        try:
            found = answer.get(timeout=timeout + _GRACE)
        except Empty:
            raise StoreError(f"it has not answered for {timeout + _GRACE:g} s") from None
        if isinstance(found, Exception):
            raise StoreError(f"{type(found).__name__}: {str(found).splitlines()[0]}") from found
        return found

    def note(self, now: str) -> None:
        """Write what this rank does, and do not wait."""
        self._jobs.put(lambda client: client.note(now))


def current_store() -> RankStore:
    """Return the rows of the present world.

    Raises:
        StoreError: If its process group has no store.
    """
    world = current_world()
    assert world is not None
    if world not in _stores:
        _stores[world] = RankStore()
    return _stores[world]


_stores: "weakref.WeakKeyDictionary[ProcessGroup, RankStore]" = weakref.WeakKeyDictionary()


class StoreClient:
    """The operations on the store, all in the thread of `RankStore`."""

    def __init__(self, store: Any, rank: int) -> None:
        self.store, self.rank = store, rank
        self.shares_timeout, self.is_open = True, False  # the time-out, with the other users of the store
        self.prefixes: dict[str, str] = {}  # by group
        self.previous: dict[str, str] = {}  # row of the last call, by group

    def open(self) -> None:
        """Take a connection of our own, since a read that waits holds it; forget what was done in an earlier world."""
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

    def note(self, now: str) -> None:
        self.open()
        self.store.set(_last(self.rank), now)

    def meet(
        self, answer: Any, group: str, call: int, index: int, ranks: list[int], row: bytes, now: str, timeout: float
    ) -> None:
        try:
            self.open()
            keys = [f"{self.prefix_of(group)}/{call}/{i}" for i in range(len(ranks))]
            self.store.multi_set([keys[index], _last(self.rank)], [row, now])
            rows = self._read(keys, timeout)
            if rows is None:
                found = self._absent(keys, index, ranks)
            else:
                found = Rendezvous(dict(zip(ranks, rows, strict=True)))
        except Exception as error:  # of any kind: the caller waits for an answer
            answer.put(error)
            return
        answer.put(found)
        if rows is not None:  # all have come here, so all have read the call before
            if group in self.previous:
                self.store.delete_key(self.previous[group])
            self.previous[group] = keys[index]

    def _read(self, keys: list[str], timeout: float) -> list[bytes] | None:
        """Read all rows; None if one is missing after the time-out, or if the store does not answer."""
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

    def _absent(self, keys: list[str], index: int, ranks: list[int]) -> Rendezvous:
        come = {rank: self.store.check([key]) for rank, key in zip(ranks, keys, strict=True)}
        if all(come.values()):  # the last one just now
            return Rendezvous(dict(zip(ranks, self.store.multi_get(keys), strict=True)))
        self.store.set(keys[index], GAVE_UP)
        last = {}
        for rank in [rank for rank in ranks if not come[rank]]:
            key = _last(rank)
            last[rank] = self.store.get(key).decode() if self.store.check([key]) else ""
        return Rendezvous({}, last)


def _last(rank: int) -> str:
    return f"syncbn/order/last/{rank}"


def _work(jobs: "SimpleQueue[Callable[[StoreClient], None] | None]", client: StoreClient) -> None:
    while (job := jobs.get()) is not None:
        with suppress(
            Exception
        ):  # the caller has stopped waiting; the next rendezvous reports what is wrong with the store
            job(client)


def _default_store() -> Any:
    try:
        store = default_store()
    except (AttributeError, KeyError) as error:
        raise StoreError(f"this torch does not give it away ({error})") from error
    if store is None:
        raise StoreError("the process group has none")
    return store
