"""Run a function on new rank processes, or on one rank of a group that exchanges nothing, and return its results.

Every call starts fresh processes from a server that has done nothing but imports: they are there in a moment, and
their peak memory is their own (that of a process started the ordinary way begins at its parent's). They meet over a
file and are gone when the call ends, by an error or a time-out too.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from syncbn.compat import destroy_process_group

FAKE_WORLD_SIZE = 2
PRELOAD = ["torch", "torch.distributed", "hydra", "experiment.bench.report"]  # what launch/bench.py imports


class Setting(NamedTuple):
    """How the ranks of one call run.

    `timeout` is in seconds; with `fake` the one process has a group of two whose collectives return at once.
    """

    timeout: float
    device: str = "cpu"
    num_threads: int = 1
    fake: bool = False


def run(function: Callable[..., Any], num_processes: int, setting: Setting, *args: Any) -> list[Any]:
    """Return ``[function(*args) for each rank]``, all ranks at once in one process group.

    Args:
        function: Stands at the top level of a module.
        num_processes: Ranks.
        setting: How they run.
        args: What pickles.

    Raises:
        RuntimeError: With the tracebacks of the ranks that failed, or the ranks that gave no answer in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    ranks: list[tuple[BaseProcess, Connection]] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(num_processes):
                ours, theirs = context.Pipe()
                job = (theirs, rank, num_processes, Path(folder) / "store", setting, function, args)
                process: BaseProcess = context.Process(target=_answer, args=job, daemon=True)
                process.start()
                theirs.close()
                ranks.append((process, ours))
            return _collect([connection for _, connection in ranks], setting.timeout)
        finally:
            for process, connection in ranks:
                connection.close()
                process.kill()
                process.join()


def _collect(connections: list[Connection], timeout: float) -> list[Any]:
    """Wait for all answers, or for the first error."""
    deadline = time.monotonic() + timeout
    answers: dict[int, Any] = {}
    while len(answers) < len(connections):
        waiting = [connection for rank, connection in enumerate(connections) if rank not in answers]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = sorted(set(range(len(connections))) - answers.keys())
            raise RuntimeError(f"expected an answer of ranks {missing} within {timeout:g} s; set timeout higher")
        for connection in waiting:
            if connection in ready:
                rank = connections.index(connection)
                answers[rank] = _receive(rank, connection)
    return [answers[rank] for rank in range(len(connections))]


def _receive(rank: int, connection: Connection) -> Any:
    try:
        error, value = connection.recv()
    except EOFError:
        error, value = "the process ended\n", None
    if error is not None:
        raise RuntimeError(f"rank {rank} failed:\n{error}")
    return value


def _answer(
    connection: Connection,
    rank: int,
    world_size: int,
    store: Path,
    setting: Setting,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    answer: tuple[str | None, Any]
    try:
        torch.set_num_threads(setting.num_threads)
        torch.manual_seed(0)
        with fake_group() if setting.fake else _real_group(rank, world_size, store, setting):
            answer = (None, function(*args))
    except Exception:
        answer = (traceback.format_exc(), None)
    connection.send(answer)


@contextmanager
def _real_group(rank: int, world_size: int, store: Path, setting: Setting) -> Iterator[None]:
    if setting.device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if setting.device == "cuda" else "gloo",
        store=dist.FileStore(str(store), world_size),  # type: ignore[attr-defined]
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=setting.timeout),
    )
    yield
    dist.barrier()
    destroy_process_group()


@contextmanager
def fake_group() -> Iterator[None]:
    """Make this process rank 0 of two, in a group whose collectives return at once and reduce nothing.

    It serves to time and to count what happens between collectives.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=FAKE_WORLD_SIZE)
    try:
        yield
    finally:
        destroy_process_group()
