"""The implementations that are measured: how each converts a model with nn.BatchNorm, and its kernels."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from torch import nn

import syncbn
from experiment.bench import baselines


class Contender(NamedTuple):
    """What tables call it, how a model becomes one, and the name of the kernels of `syncbn.use_kernels`."""

    label: str
    convert: Callable[[nn.Module], nn.Module]
    kernels: str = "auto"


CONTENDERS = {
    "plain": Contender("nn.BatchNorm", lambda model: model),
    "bare": Contender("nn.BatchNorm + bare all_reduces", partial(baselines.replace, cls=baselines.BareBatchNorm)),
    "cpu": Contender("SyncBatchNorm, C++ kernels", syncbn.convert, "cpu"),
    "reference": Contender("SyncBatchNorm, reference kernels", syncbn.convert, "reference"),
    "composed": Contender(
        "composed of autograd operators", partial(baselines.replace, cls=baselines.ComposedBatchNorm)
    ),
    "gather": Contender("gather-based, reference kernels", partial(baselines.replace, cls=baselines.GatherBatchNorm)),
    "floor": Contender("streaming floor", partial(baselines.replace, cls=baselines.Floor)),
}


def check(names: Sequence[str]) -> None:
    """Refuse an unknown contender.

    Raises:
        ValueError: With the choices.
    """
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown:
        raise ValueError(f"contenders: expected names out of {', '.join(CONTENDERS)}, got {', '.join(unknown)}")
