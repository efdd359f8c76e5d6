"""Process groups for one process on one device: one whose collectives return at once, and one of a single rank."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.compat import destroy_process_group
from syncbn.distributed import exchange
from syncbn.distributed.groups import GroupSpec

FAKE_WORLD_SIZE = 8


@contextmanager
def fake_group() -> Iterator[None]:
    """Make this process rank 0 of 8, in a group that reduces nothing: for time, waits and launches, not for numbers.

    nn.SyncBatchNorm gathers into ``(1, W * (2C + 1))``, which a fake gather cannot split, and a fake gather is W
    copies. Here it is one kernel, as NCCL's is; a fake all_reduce launches nothing.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def gather(output: Tensor, input: Tensor, *_: Any, **__: Any) -> None:
        output.view(FAKE_WORLD_SIZE, -1).copy_(input.view(1, -1))

    names = [name for name in ("all_gather_single", "all_gather_into_tensor") if hasattr(dist, name)]
    stand_ins: dict[str, Any] = dict.fromkeys(names, gather)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=FAKE_WORLD_SIZE)
    try:
        with mock.patch.multiple(dist, **stand_ins):
            yield
    finally:
        destroy_process_group()


def _resolve(spec: GroupSpec) -> Any:
    """Find the world, even if it is one rank: torch.compile traces this as it does the method that it replaces."""
    return dist.group.WORLD


@contextmanager
def group_of_one(device: str) -> Iterator[None]:
    """Make a group of this process alone, NCCL on a GPU and gloo on a CPU, over which layers exchange all the same.

    Without the patch a group of one is plain F.batch_norm.
    """
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            store=dist.FileStore(str(Path(folder) / "store"), 1),  # type: ignore[attr-defined]
            rank=0,
            world_size=1,
            timeout=timedelta(seconds=60),
        )
        try:
            with mock.patch.object(GroupSpec, "resolve", _resolve):
                if exchange.group_of(GroupSpec(None), "this check") is None:
                    raise AssertionError("expected layers to exchange over the group of one, they would not")
                yield
        finally:
            if device == "cuda":
                with suppress(RuntimeError):  # of a part that failed: its own error says more
                    torch.cuda.synchronize()  # nothing is under way when the group goes
            destroy_process_group()


class _Recorder:
    """Notes the direction of every exchange."""

    hint = ""

    def __init__(self) -> None:
        self.directions: list[str] = []

    def before_exchange(self, group: Any, num_numbers: int, name: str, direction: str, facts: Any) -> None:
        self.directions.append(direction)

    def note_eval(self, name: str) -> None:
        pass


@contextmanager
def record_exchanges() -> Iterator[list[str]]:
    """Give the directions of the exchanges that eager layers make inside, in their order: "forward", "backward"."""
    recorder = _Recorder()
    before = exchange.observe(recorder)
    try:
        yield recorder.directions
    finally:
        exchange.observe(before)
