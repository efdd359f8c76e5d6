"""The implementations that are measured: how each converts a model with nn.BatchNorm, its kernels, and if compiled."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

import syncbn
from experiment.bench import baselines
from experiment.bench.bare import BareBatchNorm


class Contender(NamedTuple):
    """What tables call it, how a model becomes one, its kernels (of `syncbn.use_kernels`), and if it is compiled."""

    label: str
    convert: Callable[[nn.Module], nn.Module]
    kernels: str = "auto"
    is_compiled: bool = False


_EAGER = {
    "plain": Contender("nn.BatchNorm", lambda model: model),
    "bare": Contender("nn.BatchNorm + bare all_reduces", partial(baselines.replace, cls=BareBatchNorm)),
    "cpu": Contender("SyncBatchNorm, C++ kernels", syncbn.convert, "cpu"),
    "reference": Contender("SyncBatchNorm, reference kernels", syncbn.convert, "reference"),
    "composed": Contender(
        "composed of autograd operators", partial(baselines.replace, cls=baselines.ComposedBatchNorm)
    ),
    "gather": Contender("gather-based, reference kernels", partial(baselines.replace, cls=baselines.GatherBatchNorm)),
    "floor": Contender("streaming floor", partial(baselines.replace, cls=baselines.Floor)),
}
CONTENDERS = _EAGER | {
    "plain_compiled": _EAGER["plain"]._replace(label="nn.BatchNorm, torch.compile", is_compiled=True),
    "bare_compiled": _EAGER["bare"]._replace(label="nn.BatchNorm + bare all_reduces, torch.compile", is_compiled=True),
    "compiled": Contender("SyncBatchNorm, torch.compile", syncbn.convert, is_compiled=True),
}


def prepare(name: str, model: nn.Module, device: str | torch.device) -> nn.Module:
    """Make ``model`` the contender, on ``device``, compiled if it is to be; sizes are fixed in its graphs."""
    model = CONTENDERS[name].convert(model).to(device)
    return torch.compile(model, dynamic=False) if CONTENDERS[name].is_compiled else model  # type: ignore[return-value]


def base_for(name: str, base: str) -> str:
    """Return what a contender is compared with: ``base``, compiled if the contender is compiled."""
    return f"{base}_compiled" if CONTENDERS[name].is_compiled else base


def count_graph_breaks(name: str, run: Callable[[], object]) -> int | None:
    """Compile by a first run, and count; None for what is not compiled.

    Raises:
        RuntimeError: If nothing was compiled, as with torch.compile turned off.
    """
    if not CONTENDERS[name].is_compiled:
        return None
    from torch._dynamo.utils import counters

    counters.clear()
    run()
    if not counters["stats"]["unique_graphs"]:
        raise RuntimeError(f"expected torch.compile to make a graph of {name}, got none; is TORCHDYNAMO_DISABLE set?")
    return sum(counters["graph_break"].values())


def check(names: Sequence[str], may_be_compiled: bool) -> None:
    """Refuse an unknown contender, and a compiled one in a part that does not compile.

    Raises:
        ValueError: With the choices.
    """
    known = CONTENDERS if may_be_compiled else _EAGER
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"contenders: expected names out of {', '.join(known)}, got {', '.join(unknown)}")
