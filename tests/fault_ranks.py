"""Launch ranks that may raise, stop or die: each a process of its own, which ends as it would in a user's job.

A `Launch` runs ``function(rank, world_size, *args)`` on gloo ranks that know of each other only through their process
group. A rank that raises ends at once; one that stops itself (SIGSTOP) is woken after ``wake_after`` seconds; ranks
that outlast the time-outs are killed and marked as hung. Nothing a rank started may outlive it. `Launches` keeps
several under way, since they mostly wait.
"""

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

MEETING = 120  # seconds until all ranks have met, and the limit of what needs no time-out
TIMEOUT = 8  # seconds of the process group, where a fault is found by waiting
CHECK_TIMEOUT = 5  # of the order check, then

_TERMINATED = "terminate called without an active exception"
_PR_SET_PDEATHSIG = 1  # Linux: the signal to get when the parent ends
_context = multiprocessing.get_context("forkserver")


@dataclass
class End:
    """How one rank ended: ``code`` is that of its process, negative for a signal."""

    code: int
    error: tuple[str, str] | None  # class and message of what it raised
    result: Any
    output: str
    hung: bool

    @property
    def kind(self):
        """Return "returned", the class of the error, the name of the signal, or "hung"."""
        if self.hung:
            return "hung"
        # torch's threads, now and then, when an interpreter ends by an error with its process group still there
        is_afterwards = self.error and self.code == -signal.SIGABRT and _TERMINATED in self.output
        if self.code < 0 and not is_afterwards:
            return signal.Signals(-self.code).name
        return self.error[0] if self.error else f"exit {self.code}" if self.code else "returned"


@dataclass
class Setting:
    """How ranks are set up; ``programs``: whether each is a new interpreter, with its own way of ending."""

    folder: Path
    check: bool = False
    timeouts: tuple[float, float] = (MEETING, MEETING)  # of the process group, of the order check
    store_on_rank_0: bool = False  # a TCPStore, which dies with that rank; else a file
    programs: bool = False


class Launch:
    """Ranks under way; `poll` says whether all have ended, and `ends` how."""

    def __init__(self, setting, function, world_size, *args, wake_after=0.0):
        self.folder, self.wake_after = setting.folder, wake_after
        self.limit = 2 * max(setting.timeouts) + wake_after + 30  # a busy machine is slow to notice
        self.deadline, self.met = time.monotonic() + MEETING + self.limit, False
        self.stopped, self.hung = {}, set()
        self.folder.mkdir()
        start = _start_program if setting.programs else _start_process
        self.processes = [start(rank, world_size, setting, function, args) for rank in range(world_size)]

    def poll(self):
        running = {rank: process for rank, process in enumerate(self.processes) if process.exitcode is None}
        now = time.monotonic()
        if not self.met and all((self.folder / f"{rank}.met").exists() for rank in range(len(self.processes))):
            self.deadline, self.met = now + self.limit, True
        for process in running.values():
            if _is_stopped(process.pid) and now >= self.stopped.setdefault(process.pid, now) + self.wake_after:
                os.kill(process.pid, signal.SIGCONT)
        if running and now > self.deadline:
            self.hung = set(running)
            self.kill()
        return not running or bool(self.hung)

    def kill(self):
        for process in self.processes:
            if process.exitcode is None:
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(process.pid, signal.SIGKILL)
            process.join()

    def ends(self):
        """Return the `End` of each rank, when `poll` has said that all have ended."""
        self.kill()
        for process in self.processes:
            assert not _group_lives(process.pid), f"something that process {process.pid} started is left"
        return [self._end(rank, process.exitcode) for rank, process in enumerate(self.processes)]

    def _end(self, rank, code):
        report, output = self.folder / f"{rank}.report", self.folder / f"{rank}.txt"
        result, error = pickle.loads(report.read_bytes()) if report.exists() else (None, None)
        return End(code, error, result, output.read_text() if output.exists() else "", rank in self.hung)


class Launches:
    """Launches to come, in the order in which they will be asked for; ``num_at_once`` are under way."""

    def __init__(self, to_come, num_at_once=12):
        self.to_come, self.under_way, self.num_at_once = dict(to_come), {}, num_at_once

    def ends(self, key):
        """Wait for the launch of that key."""
        while key in self.to_come or not self.under_way[key].poll():
            while self.to_come and sum(not launch.poll() for launch in self.under_way.values()) < self.num_at_once:
                following = next(iter(self.to_come))
                self.under_way[following] = self.to_come.pop(following)()
            time.sleep(0.02)
        return self.under_way.pop(key).ends()

    def close(self):
        for launch in self.under_way.values():
            launch.kill()


def _start_process(rank, world_size, setting, function, args):
    _context.set_forkserver_preload(["torch", "torch.distributed", "syncbn"])
    process = _context.Process(target=_rank, args=(rank, world_size, setting, function, args))
    process.start()
    return process


class _Program:
    """A new interpreter, looked at like a multiprocessing.Process."""

    def __init__(self, arguments):
        code = "import fault_ranks, pickle, sys; fault_ranks._rank(*pickle.loads(bytes.fromhex(sys.argv[1])))"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        setting = arguments[2]
        if setting.check:
            more = {"SYNCBN_CHECK_ORDER": "1", "SYNCBN_CHECK_ORDER_TIMEOUT": str(setting.timeouts[1])}
            environment.update(more)
        self._popen = subprocess.Popen([sys.executable, "-c", code, pickle.dumps(arguments).hex()], env=environment)
        self.pid, self.join = self._popen.pid, self._popen.wait

    @property
    def exitcode(self):
        return self._popen.poll()


def _start_program(*arguments):
    return _Program(arguments)


def _is_stopped(pid):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def _group_lives(pid):
    """Whether anything is left of the process group that a rank made for itself."""
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _rank(rank, world_size, setting, function, args):
    """Be one rank, from its meeting with the others to its end."""
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # not to stay stopped when the launcher is killed
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell in the background has switched off
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # gloo aborts a process whose message has the wrong size
    with open(setting.folder / f"{rank}.txt", "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    store = _store(rank, setting, world_size)
    wait = timedelta(seconds=MEETING)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=wait)
    _warm_up()
    getattr(dist, "set_timeout", dist.distributed_c10d._set_pg_timeout)(timedelta(seconds=setting.timeouts[0]))
    (setting.folder / f"{rank}.met").touch()
    with _reported(setting.folder / f"{rank}.report") as report, _checked(setting):
        report[:] = function(rank, world_size, *args), None
    if dist.is_initialized():
        dist.destroy_process_group()


def _warm_up():
    """Train for a step together: the first one may build kernels, which takes longer than the time-outs to come."""
    import torch

    import syncbn

    for dtype in (torch.float64, torch.float32):
        x = torch.randn(4, 3, dtype=dtype, requires_grad=True)
        syncbn.SyncBatchNorm(3, dtype=dtype)(x).pow(3).sum().backward()


def _store(rank, setting, world_size):
    import torch.distributed as dist

    port_file = setting.folder / "port"
    if not setting.store_on_rank_0:
        return dist.FileStore(str(setting.folder / "store"), world_size)
    if rank == 0:
        server = socket.create_server(("127.0.0.1", 0))
        port = server.getsockname()[1]
        store = dist.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False, master_listen_fd=server.detach())
        port_file.with_suffix(".tmp").write_text(str(port))
        port_file.with_suffix(".tmp").rename(port_file)
        return store
    while not port_file.exists():
        time.sleep(0.02)
    return dist.TCPStore("127.0.0.1", int(port_file.read_text()), None, False, wait_for_workers=False)


@contextlib.contextmanager
def _reported(path):
    """Write what the rank returned, or raised, for the launcher."""
    report = [None, None]
    try:
        yield report
    except BaseException as error:
        report[1] = type(error).__name__, str(error)
        traceback.print_exc()
        raise
    finally:
        path.with_suffix(".tmp").write_bytes(pickle.dumps(report))
        path.with_suffix(".tmp").rename(path)


def _checked(setting):
    if not setting.check or setting.programs:  # which are told by their environment
        return contextlib.nullcontext()
    import syncbn.debug

    return syncbn.debug.check_order(timeout=setting.timeouts[1])
