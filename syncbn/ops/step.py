"""The training step of one layer as one C++ function, for small layers, whose time is host work: see step.cpp.

It serves what is usual: plain tensors on the CPU, no activation checkpointing, nobody who traces. All else is
`autograd`, the second order too. Either can run on any rank: the exchanges and the bits are the same. Building takes
torch's headers and about 20 s, once for a user, machine and torch; where it cannot be kept only ``fused`` builds it.
"""

import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import kernels
from .collectives import gather_limit
from .compat import BUILDS_STEP
from .kernels import build

_SOURCE = Path(__file__).with_name("step.cpp")
_NOTICE = (
    "syncbn: building its C++ training step for this machine, once; this takes about 20 s. SYNCBN_KERNELS=native "
    "builds nothing."
)
_PLAIN, _NUMBER = (Tensor, torch.nn.Parameter), (float, int)
OF_EXCHANGE = "(in an exchange of SyncBatchNorm)"  # what step.cpp writes into the errors of its exchange forward
_lock = threading.Lock()
_asked: set[str] = set()  # choices of kernels under which the library was looked for
_train: Callable[..., Tensor | None] | None = None


def train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches: Tensor | None,
    momentum: float | Tensor | None,
    eps: float,
    group: ProcessGroup,
) -> Tensor | None:
    """Do what `autograd.normalize_batch` does for one layer, or return None for what is not usual."""
    if not x.is_cpu or type(x) not in _PLAIN or not isinstance(momentum, _NUMBER) or kernels.fused.is_traced():
        return None
    if not _is_ready() or type(group) is not ProcessGroup:  # a group in Python has no name to be found by
        return None
    assert _train is not None
    limit = gather_limit(group, True)
    return _train(x, weight, bias, running_mean, running_var, num_batches, momentum, eps, group.group_name, limit)


def _is_ready() -> bool:
    """Whether the kernels in force are those of this step, and it is there; the first call builds or loads it."""
    choice = kernels.choice()
    if choice not in ("auto", "fused") or not BUILDS_STEP:
        return False
    if choice not in _asked:
        with _lock:
            _load(choice)
    return _train is not None


def _load(choice: str) -> None:
    global _train
    _asked.add(choice)
    if _train is not None:
        return
    try:
        if not kernels.fused.is_ready() or (choice == "auto" and not build.keeps()):
            return
        build.load(_SOURCE, _flags(), _NOTICE)
        operator = torch.ops.syncbn.train.default
        _train = getattr(operator, "_op", operator)  # without the call that finds it
    except Exception as error:  # of any kind: Python goes on
        if choice == "auto":
            return
        warnings.warn(
            f"SYNCBN_KERNELS={choice}: expected to build or load the C++ training step, got {type(error).__name__}: "
            f"{error}. This process goes on with more host work per layer.",
            RuntimeWarning,
            stacklevel=6,
        )


def _flags() -> tuple[str, ...]:
    folder = Path(torch.__file__).parent
    include = [f"-I{folder / 'include'}", f"-I{folder / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    return "-std=c++20", "-DUSE_DISTRIBUTED", "-DUSE_C10D_GLOO", f"-DTORCH={torch.__version__}", *include, *libraries
