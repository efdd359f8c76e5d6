"""A pool of rank processes, which run functions and return their results.

The processes come from a server that has done nothing but imports: they start in a moment, and their peak memory is
their own (that of a process started the ordinary way begins at its parent's). They find each other through a file.
"""

import contextlib
import faulthandler
import itertools
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from syncbn.compat import destroy_process_group

Prepare = Callable[[str], None]
GRACE = 5  # seconds for the other ranks after the first one has failed
Answer = tuple[str, Any]  # "result" and its value; else a kind of failure and the error's class, message, traceback


class RankError(RuntimeError):
    """One or more ranks failed; ``errors`` maps the rank to its exception's class name and message."""

    def __init__(self, message: str, errors: dict[int, tuple[str, str]]) -> None:
        super().__init__(message)
        self.errors = errors


class Job(NamedTuple):
    function: Callable[..., Any]
    args: tuple[Any, ...]
    rank: int
    world_size: int
    store: str  # path of the file through which the ranks find each other
    initialize: bool
    timeout: float


class RankPool:
    """Rank processes that stay alive between calls, with a new process group for each call.

    On cuda a call with no more ranks than GPUs runs on NCCL, one GPU per rank; any other on gloo, with GPUs shared.

    Args:
        folder: For the files of the processes.
        device: "cpu" or "cuda".
        num_threads: Of each process.
        preload: Modules that the processes find imported.
        prepare: Called with `device` in each process before its first call.
    """

    def __init__(
        self, folder: Path, device: str, num_threads: int, preload: list[str], prepare: Prepare | None = None
    ) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(preload)
        self._folder, self._arguments = folder, (folder, device, num_threads, prepare)
        self._workers: list[tuple[BaseProcess, Connection]] = []
        self._calls = itertools.count()

    def run(
        self, function: Callable[..., Any], world_size: int, *args: Any, timeout: float, initialize: bool
    ) -> list[Any]:
        """Return ``[function(rank, world_size, *args) for rank in range(world_size)]``, all ranks at once.

        The function must be importable, `args` must pickle. `timeout` is in seconds, of which a collective may take
        half; `initialize` says whether the ranks have a process group.

        Raises:
            RankError: With the tracebacks of the ranks that failed, and the stacks of those without an answer.
        """
        while len(self._workers) < world_size:
            self._workers.append(self._start())
        connections = [connection for _, connection in self._workers[:world_size]]
        store = str(self._folder / f"store{next(self._calls)}")
        try:
            for rank, connection in enumerate(connections):
                connection.send(Job(function, args, rank, world_size, store, initialize, timeout))
            answers = _collect(connections, timeout)
            missing = sorted(set(range(world_size)) - answers.keys())
            stacks = {rank: self._stack(rank) for rank in missing}
        except BaseException:  # such as an interrupt: a later call must not get the answers of this one
            self.close()
            raise
        # torch counts the groups of a process, also those that failed, and lets only equal counts find each other
        kinds = {kind for kind, _ in answers.values()}
        if missing or kinds & {"ended", "no group"}:
            self.close()
        failed = {rank: value for rank, (kind, value) in answers.items() if kind != "result"}
        if failed or missing:
            texts = [f"rank {rank} of {world_size} failed:\n{text}" for rank, (_, _, text) in failed.items()]
            if failed and missing:
                texts.append(f"ranks {missing} were still running {GRACE} s later")
            elif missing:
                texts.append(f"expected an answer of ranks {missing} within {timeout:g} s; set timeout higher")
            texts += [f"rank {rank} of {world_size} is at\n{stack}" for rank, stack in stacks.items()]
            raise RankError("\n".join(texts), {rank: value[:2] for rank, value in failed.items()})
        return [answers[rank][1] for rank in range(world_size)]

    def close(self) -> None:
        """End the processes; the next call starts others."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers.clear()

    def _start(self) -> tuple[BaseProcess, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def _stack(self, rank: int) -> str:
        """Return the Python stacks of a process that gave no answer."""
        process = self._workers[rank][0]
        path = self._folder / f"stacks{process.pid}"
        if not path.with_suffix(".ready").exists():
            return "its start"
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid or 0, signal.SIGUSR1)
        deadline = time.monotonic() + GRACE
        while not path.read_text().endswith("\n") and time.monotonic() < deadline:
            time.sleep(0.1)
        return path.read_text()


def _collect(connections: Sequence[Connection], timeout: float) -> dict[int, Answer]:
    """Wait for the answers, and only a little longer once one of them is an error."""
    deadline = time.monotonic() + timeout
    waiting = dict(zip(connections, itertools.count()))
    answers: dict[int, Answer] = {}
    while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
        for connection in ready:
            assert isinstance(connection, Connection)
            try:
                answer = connection.recv()
            except EOFError:
                answer = "ended", ("EOFError", "", "the process ended\n")
            answers[waiting.pop(connection)] = answer
            if answer[0] != "result":
                deadline = min(deadline, time.monotonic() + GRACE)
    return answers


def _serve(connection: Connection, folder: Path, device: str, num_threads: int, prepare: Prepare | None) -> None:
    """Answer calls until the connection closes."""
    stacks = open(folder / f"stacks{os.getpid()}", "w")  # noqa: SIM115  # as long as the process
    faulthandler.register(signal.SIGUSR1, stacks)
    (folder / f"stacks{os.getpid()}.ready").touch()
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    torch.set_num_threads(num_threads)
    if prepare is not None:
        prepare(device)
    with contextlib.suppress(EOFError):
        while True:
            connection.send(_call(connection.recv(), device))


def _call(job: Job, device: str) -> Answer:
    kind = "no group"
    try:
        torch.manual_seed(0)
        num_gpus = torch.cuda.device_count() if device == "cuda" else 0
        if num_gpus:
            torch.cuda.set_device(job.rank % num_gpus)
        with _group(job, num_gpus) if job.initialize else contextlib.nullcontext():
            kind = "error"
            return "result", job.function(job.rank, job.world_size, *job.args)
    except BaseException as error:
        return kind, (type(error).__name__, str(error), traceback.format_exc())


@contextmanager
def _group(job: Job, num_gpus: int) -> Iterator[None]:
    dist.init_process_group(
        "nccl" if job.world_size <= num_gpus else "gloo",
        store=dist.FileStore(job.store, job.world_size),  # type: ignore[attr-defined]
        rank=job.rank,
        world_size=job.world_size,
        timeout=timedelta(seconds=job.timeout / 2),
    )
    try:
        yield
    finally:
        if dist.is_initialized():
            destroy_process_group()
