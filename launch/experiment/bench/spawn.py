"""Run a function on new rank processes, or in a group that exchanges nothing, and return its results."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from experiment.bench.rank_pool import RankPool
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
    """Return ``[function(*args) for each rank]``, of processes that are gone when the call ends.

    Raises:
        RankError: As `RankPool.run`.
    """
    with tempfile.TemporaryDirectory() as folder:
        pool = RankPool(Path(folder), setting.device, setting.num_threads, PRELOAD)
        job = (_measure, num_processes, setting.fake, function, *args)
        try:
            return pool.run(*job, timeout=setting.timeout, initialize=not setting.fake)
        finally:
            pool.close()


def _measure(rank: int, world_size: int, fake: bool, function: Callable[..., Any], *args: Any) -> Any:
    with fake_group() if fake else nullcontext():
        return function(*args)


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
