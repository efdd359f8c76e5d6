"""Run a function on W ranks: processes that stay alive between tests, a fresh process group for each call.

A test calls ``run(function, world_size, *args)`` and gets the list of what ``function(rank, world_size, *args)``
returned. The function must stand at the top level of a test module. An error on any rank raises `RankError` with that
rank's traceback; ranks that do not answer in time are named, and all processes are replaced.
"""

import builtins
import contextlib
import faulthandler
import itertools
import multiprocessing
import os
import pickle
import signal
import time
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path

from versions import IS_DEVELOPMENT, MAY_WARN

TIMEOUT = 60  # seconds for one call; a compiling test asks for more
GRACE = 5  # seconds that the others get after the first rank failed

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "syncbn"])


_device_type = "cpu"  # of this process, where it is a rank


def device():
    """Return the device of this rank: its GPU, which it may share with others, else the CPU."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if _device_type == "cuda" else torch.device("cpu")


class RankError(AssertionError):
    """One or more ranks failed; ``errors`` maps the rank to its exception's class name and message."""

    def __init__(self, message: str, errors: dict[int, tuple[str, str]]) -> None:
        super().__init__(message)
        self.errors = errors


class Ranks:
    """A pool of rank processes on one device type.

    For cuda a call with no more ranks than GPUs runs on NCCL, one GPU per rank. The ranks of any other call share the
    GPUs and run on gloo, since NCCL refuses two ranks on one GPU. For cpu all is gloo.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.device = device
        self._workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
        self._folder = folder  # of the file stores
        self._calls = itertools.count()

    def run(self, function, world_size, *args, timeout=TIMEOUT, initialize=True):
        """Return ``[function(rank, world_size, *args) for rank in range(world_size)]``, all ranks at once."""
        while len(self._workers) < world_size:
            self._workers.append(self._start())
        store = str(self._folder / str(next(self._calls))) if initialize else None
        job = (function, world_size, args, store, timeout)
        connections = [connection for _, connection in self._workers[:world_size]]
        for rank, connection in enumerate(connections):
            connection.send_bytes(pickle.dumps((rank, *job)))
        results, errors = self._collect(connections, timeout)
        missing = sorted(set(range(world_size)) - results.keys() - errors.keys())
        stacks = [self._stack(rank) for rank in missing]
        if missing:
            self.close()
        if errors or missing:
            texts = [f"rank {rank} of {world_size} failed:\n{text}" for rank, (_, _, text) in sorted(errors.items())]
            texts += [
                f"rank {rank} of {world_size} gave no answer within {timeout} s; it is at\n{stack}"
                for rank, stack in zip(missing, stacks, strict=True)
            ]
            raise RankError("\n".join(texts), {rank: error[:2] for rank, error in errors.items()})
        return [results[rank] for rank in range(world_size)]

    def close(self):
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers.clear()

    def _stack(self, rank):
        """Return the Python stacks of a process that gave no answer."""
        process, path = self._workers[rank][0], self._folder / f"stacks{self._workers[rank][0].pid}"
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGUSR1)
        deadline = time.monotonic() + GRACE
        while not path.read_text().endswith("\n") and time.monotonic() < deadline:
            time.sleep(0.1)
        return path.read_text()

    def _start(self):
        ours, theirs = _context.Pipe()
        process = _context.Process(target=_serve, args=(theirs, self.device, self._folder), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def _collect(self, connections, timeout):
        deadline = time.monotonic() + timeout
        waiting = dict(zip(connections, itertools.count()))
        results, errors = {}, {}
        while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    kind, value = pickle.loads(connection.recv_bytes())
                except EOFError:
                    kind, value = "error", ("EOFError", "", "the process ended\n")
                if kind == "result":
                    results[rank] = value
                else:
                    errors[rank] = value
                    deadline = min(deadline, time.monotonic() + GRACE)
        return results, errors


def _serve(connection, device, folder):
    """Answer calls until the connection closes."""
    global _device_type
    _device_type = device
    stacks = open(folder / f"stacks{os.getpid()}", "w")  # noqa: SIM115  # as long as the process
    faulthandler.register(signal.SIGUSR1, stacks)
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for line in () if IS_DEVELOPMENT else MAY_WARN:
        action, message, category = line.split(":")
        warnings.filterwarnings(action, message, getattr(builtins, category))
    for message in ("`torch.jit.script", ".*autograd.function.Function.* should not be instantiated"):
        warnings.filterwarnings("ignore", message, DeprecationWarning)  # torch 2.13's own, while it compiles
    warnings.filterwarnings("ignore", "The `srun` command is available on your system but is not used")
    with contextlib.suppress(EOFError):
        while True:
            rank, function, world_size, args, store, timeout = pickle.loads(connection.recv_bytes())
            try:
                answer = ("result", _call(rank, function, world_size, args, store, timeout, device))
            except BaseException as error:
                answer = ("error", (type(error).__name__, str(error), traceback.format_exc()))
            connection.send_bytes(pickle.dumps(answer))


def _call(rank, function, world_size, args, store, timeout, device):
    import torch
    import torch.distributed as dist

    from syncbn.compat import destroy_process_group

    torch.manual_seed(0)
    num_gpus = torch.cuda.device_count() if device == "cuda" else 0
    if num_gpus:
        torch.cuda.set_device(rank % num_gpus)
    if store is None:
        return function(rank, world_size, *args)
    dist.init_process_group(
        "nccl" if world_size <= num_gpus else "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout / 2),
    )
    try:
        return function(rank, world_size, *args)
    finally:
        if dist.is_initialized():
            destroy_process_group()
