"""Collectives: how many a training step makes and how much goes through them, and what one costs here."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from experiment.bench import spawn, timing
from experiment.bench.contenders import CONTENDERS
from experiment.bench.tables import Table, spread
from experiment.training.models import classifiers
from syncbn import use_kernels
from syncbn.compat import all_gather_single

Row = dict[str, Any]
NUM_CLASSES = 1000
NUM_CALLS = 10  # timed together, so that the barrier before them weighs little
_PAYLOAD = {  # which argument a rank gives
    "c10d::allreduce_": 0,
    "c10d::allgather_": 1,
    "c10d::_allgather_base_": 1,
    "_c10d_functional::all_reduce": 0,
    "_c10d_functional::all_gather_into_tensor": 0,
}
_LOCAL = {"_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd"}


def measure(config: DictConfig) -> list[Row]:
    """Count collectives, bytes and operators of training steps, and time the two collectives that can do the sum.

    Returns:
        Rows of `kind` "counted": `arch`, `contender`, `direction`, `collectives`, `bytes` that a rank gives to them,
        `operators` dispatched below autograd. Rows of `kind` "timed": `world_size`, `numbers` (float64), and what
        `timing.summarize` says.
    """
    part, rows = config.collectives, []
    with spawn.fake_group():
        for arch in part.archs:
            for name in part.contenders:
                rows += _count(arch, name, part.image_size, config.device)
    setting = spawn.Setting(config.timeout, config.device, config.threads)
    for world_size in part.world_sizes:
        answers = spawn.run(_time, world_size, setting, list(part.numbers), part.rounds, config.device)
        for num, *of_ranks in zip(part.numbers, *answers, strict=True):
            found = timing.summarize(timing.slowest(of_ranks), ("all_reduce",))
            rows += [{"kind": "timed", "world_size": world_size, "numbers": num, **row} for row in found]
    return rows


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count operators and collectives that are dispatched inside the context, in a backward pass too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_operators = self.num_collectives = self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operator and call it."""
        self.num_operators += 1
        name = func.name().split(".")[0]
        if func.namespace in ("c10d", "_c10d_functional") and name not in _LOCAL:
            given = args[_PAYLOAD[name]]
            tensors: list[Tensor] = given if isinstance(given, list) else [given]
            self.num_collectives += 1
            self.num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return func(*args, **(kwargs or {}))


def _count(arch: str, name: str, image_size: int, device: str) -> list[Row]:
    model = CONTENDERS[name].convert(classifiers.torchvision(arch, NUM_CLASSES)).to(device)
    images = torch.randn(2, 3, image_size, image_size, device=device)
    labels = torch.randint(NUM_CLASSES, (2,), device=device)
    with use_kernels(CONTENDERS[name].kernels):
        with Counter() as forward:
            loss = F.cross_entropy(model(images), labels)
        with Counter() as backward:
            loss.backward()  # type: ignore[no-untyped-call]
    return [
        {
            "kind": "counted",
            "arch": arch,
            "contender": name,
            "direction": direction,
            "collectives": counter.num_collectives,
            "bytes": counter.num_bytes,
            "operators": counter.num_operators,
        }
        for direction, counter in (("forward", forward), ("backward", backward))
    ]


def _time(numbers: Sequence[int], num_rounds: int, device: str) -> list[timing.Times]:
    """Time both ways to a sum on this rank, for every size."""
    return [timing.interleave(_ways(num, device), num_rounds, _after_others, device) for num in numbers]


@contextmanager
def _after_others(name: str) -> Iterator[None]:
    dist.barrier()
    yield


def _ways(num: int, device: str) -> dict[str, Callable[[], object]]:
    packed = torch.zeros(num, dtype=torch.float64, device=device)
    gathered = packed.new_empty(dist.get_world_size() * num)

    def all_reduce() -> None:
        for _ in range(NUM_CALLS):
            dist.all_reduce(packed)

    def all_gather() -> None:
        for _ in range(NUM_CALLS):
            all_gather_single(gathered, packed)
            gathered.view(-1, num).sum(0)

    return {"all_reduce": all_reduce, "all_gather": all_gather}


def tabulate(rows: Sequence[Row]) -> list[Table]:
    """Lay out both kinds."""
    counted = [row for row in rows if row["kind"] == "counted"]
    timed = [row for row in rows if row["kind"] == "timed"]
    return [*([_counted(counted)] if counted else []), *([_timed(timed)] if timed else [])]


def _counted(rows: Sequence[Row]) -> Table:
    lines = []
    for forward, backward in zip(rows[::2], rows[1::2], strict=True):
        both = [f"{forward[key]} + {backward[key]}" for key in ("collectives", "operators")]
        kib = [f"{direction['bytes'] / 1024:.1f}" for direction in (forward, backward)]
        lines.append([forward["arch"], CONTENDERS[forward["contender"]].label, both[0], " + ".join(kib), both[1]])
    note = "Forward + backward, per rank. KiB: what a rank gives to them. Operators: dispatched below autograd."
    return Table("Collectives per training step", ["model", "", "collectives", "KiB", "operators"], lines, note)


def _timed(rows: Sequence[Row]) -> Table:
    lines = []
    for reduce, gather in zip(rows[::2], rows[1::2], strict=True):
        ms = [f"{row['ms'].median / NUM_CALLS:.3f}" for row in (reduce, gather)]
        lines.append([str(reduce["world_size"]), str(reduce["numbers"]), *ms, spread(gather["ratios"]["all_reduce"])])
    columns = ["ranks", "float64 numbers", "all_reduce, ms", "all_gather + local sum, ms", "ratio"]
    note = f"Medians over rounds of {NUM_CALLS} calls, on the slowest rank; ratios (quartiles) within a round."
    return Table("Time of one collective", columns, lines, note)
