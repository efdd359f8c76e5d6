"""One rank of a scaling measurement: time collectives, layers and steps, and record the exchanges of each."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

import syncbn
from experiment.bench import timing
from experiment.bench.scaling.cost_model import Exchange
from experiment.bench.scaling.network import enter, interface
from experiment.bench.training_step import NUM_CLASSES, make_step
from experiment.training.instantiate import instantiate
from syncbn.compat import all_gather_single

NUM_CALLS = 3  # of a layer or a collective, timed together
_SHAPES = {64: (4, 64, 8, 8), 2048: (2, 2048, 7, 7)}  # small: a layer's time is that of its exchanges


class Subject(NamedTuple):
    """What is timed: `what` is a collective, "layer", "step" or, without synchronization, "bn layer" or "bn step"."""

    what: str
    num_features: int | None = None  # of a layer; a collective has the size of its forward exchange
    delay_ms: float = 0.0


def num_calls(subject: Subject) -> int:
    """Tell how often a subject runs in a round."""
    return 1 if subject.what.endswith("step") else NUM_CALLS


def on_rank(
    config: DictConfig, namespaces: Sequence[str]
) -> tuple[timing.Times, list[tuple[Subject, list[Exchange]]]]:
    """Time all subjects on this rank, in turn, and return the exchanges of each.

    Without namespaces the ranks are processes of one host. With them, this rank moves into its own, and everything
    that exchanges something is there once for each delay: in the same rounds, so that disturbances affect all alike.
    """
    delays = list(config.scale.delays_ms) if namespaces else [0.0]
    if namespaces:
        enter(namespaces[dist.get_rank()])
    calls = {Subject("bn step"): _step(config, None)}
    calls |= {Subject("bn layer", num): _layer(nn.BatchNorm2d(num)) for num in config.scale.num_features}
    for number, delay in enumerate(delays):
        group = _group(interface(number), config.timeout) if namespaces else dist.group.WORLD
        assert isinstance(group, ProcessGroup)
        calls |= _synchronized(config, group, delay)
    found = [(subject, _exchanges_of(call)) for subject, call in calls.items()]
    loops = {str(number): _loop(call, num_calls(subject)) for number, (subject, call) in enumerate(calls.items())}
    return timing.interleave(loops, config.scale.rounds, _after_others), found


def _group(interface: str, timeout: float) -> ProcessGroup | int | None:
    """Make a group of all ranks whose connections begin at a network interface of this rank's namespace."""
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    return dist.new_group(timeout=timedelta(seconds=timeout))


def _synchronized(config: DictConfig, group: ProcessGroup, delay: float) -> dict[Subject, Callable[[], object]]:
    calls = {Subject("step", None, delay): _step(config, group)}
    for num in config.scale.num_features:
        calls[Subject("layer", num, delay)] = _layer(syncbn.SyncBatchNorm(num, process_group=group))
        if dist.get_world_size() > 1:
            calls |= {Subject(what, num, delay): call for what, call in _collectives(num, group).items()}
    return calls


@contextmanager
def _after_others(name: str) -> Iterator[None]:
    dist.barrier()  # of the world, which has no delay
    yield


def _loop(call: Callable[[], object], num_calls: int) -> Callable[[], None]:
    def loop() -> None:
        for _ in range(num_calls):
            call()

    return loop


def _step(config: DictConfig, group: ProcessGroup | None) -> Callable[[], object]:
    torch.manual_seed(0)
    net: nn.Module = instantiate(config.model, num_classes=NUM_CLASSES, in_channels=3)
    net = net if group is None else syncbn.convert(net, process_group=group)
    return make_step(net, config.scale.per_rank_batch_size, config.scale.image_size, "cpu")


def _layer(layer: _BatchNorm) -> Callable[[], object]:
    x = torch.randn(_SHAPES.get(layer.num_features, (4, layer.num_features, 8, 8)), requires_grad=True)
    dy = torch.randn_like(x)
    inputs = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x), inputs, dy)


def _collectives(num_features: int, group: ProcessGroup) -> dict[str, Callable[[], object]]:
    packed = torch.zeros(2 * num_features + 1, dtype=torch.float64)
    gathered = packed.new_empty(len(packed) * dist.get_world_size())
    return {
        "all_reduce": lambda: dist.all_reduce(packed, group=group),
        "all_gather": lambda: all_gather_single(gathered, packed, group=group),
    }


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Note the collectives that are dispatched inside the context, in a backward pass too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.exchanges: list[Exchange] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if func.namespace == "c10d" and ("allreduce" in name or "allgather" in name):
            collective, given = ("all_reduce", args[0]) if "allreduce" in name else ("all_gather", args[1])
            tensors = given if isinstance(given, list) else [given]
            self.exchanges.append(Exchange(collective, sum(t.numel() * t.element_size() for t in tensors)))
        return func(*args, **(kwargs or {}))


def _exchanges_of(call: Callable[[], object]) -> list[Exchange]:
    with _Recorder() as recorder:
        call()
    exchanges: list[Exchange] = recorder.exchanges
    return exchanges
