"""The calls of torch.cuda that several parts make, and what counts operators where there is no GPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def sleep(cycles: int) -> None:
    """Keep the current stream busy; the host comes back at once. Private in torch, and in its tests since 1.0."""
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]


def record_event(timing: bool = True) -> torch.cuda.Event:
    """Record an event on the current stream."""
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=timing)  # type: ignore[no-untyped-call]
    event.record()
    return event


def make_stream() -> torch.cuda.Stream:
    """Make a stream beside the current one."""
    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    return stream


def operators(run: Callable[[], object]) -> list[str]:
    """Return the names of the operators that ``run`` dispatches, as "add.Tensor"."""
    with _Count() as count:
        run()
    names: list[str] = count.names
    return names


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func).removeprefix("aten."))
        return func(*args, **(kwargs or {}))
