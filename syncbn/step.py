"""The training step of one layer as one C++ function, for small layers, whose time is host work: see step.cpp.

It serves what is usual: plain tensors on the CPU, no activation checkpointing, nobody who traces. All else is
`autograd`, the second order too. Either can run on any rank: the exchanges and the bits are the same. Building takes
torch's headers and 20 s or more, so ``SYNCBN_KERNELS=fused`` builds it, once for a user and machine, and ``auto``
takes it if it has been built.
"""

import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import kernels, recompute
from .collectives import gather_limit
from .kernels import build

_SOURCE = Path(__file__).with_name("step.cpp")
_lock = threading.Lock()
_asked: set[str] = set()  # choices of kernels under which the library was looked for
_train: Callable[..., Tensor | None] | None = None


def train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    group: ProcessGroup,
) -> Tensor | None:
    """Do what `autograd.normalize_batch` does for one layer, or return None for what is not usual."""
    if isinstance(momentum, Tensor) or x.numel() <= x.shape[1] or kernels.choose(x) is not kernels.fused:
        return None
    if not _is_ready() or recompute.is_involved():
        return None
    assert _train is not None
    limit = gather_limit(group, True)
    return _train(x, weight, bias, running_mean, running_var, momentum, eps, group.boxed(), limit)


def _is_ready() -> bool:
    if kernels.choice() not in _asked:
        with _lock:
            _load(kernels.choice())
    return _train is not None


def _load(choice: str) -> None:
    global _train
    _asked.add(choice)
    if _train is not None:
        return
    try:
        if choice == "auto" and not build.is_cached(_SOURCE, _flags()):
            return
        build.load(_SOURCE, _flags())
        _train = torch.ops.syncbn.train.default
    except Exception as error:  # of any kind: Python goes on
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
