"""The four phases on the CPU in C++, each one pass over memory, with sums in float64: see `reference` for equations.

`csrc/kernels.cpp` is built on first use, within seconds, without torch's headers: one library serves all versions.
"""

import ctypes
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import build
from ..private import are_transforms_active, jit_tracing_state, num_dispatch_modes
from . import reference, selfcheck
from .layout import KERNEL_DTYPES, dense_view, is_readable
from .reference import Running

_Dtype = torch.dtype | None
_Maybe = Tensor | None
_P, _I, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_ARGUMENTS = {
    "forward_reduce": [_P, _I, _P, _P],
    "forward_apply": [_P, _I, _D, _D, _I, *[_P] * 8],
    "backward_reduce": [_P, _I, *[_P] * 6],
    "backward_apply": [_P, _I, *[_P] * 6],
}

_FREED = (
    "SyncBatchNorm: expected the weight and all other tensors of this step to be in memory, found one whose storage "
    "was freed; keep it, or gather it again before (as FSDP does)."
)
_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_is_decided = False
_problem = ""  # what kept the library from being built, until a user has been warned


class _Layout(ctypes.Structure):
    """As in kernels.cpp: dtypes by number, -1 where there is no such tensor."""

    _fields_ = [(name, _I) for name in ("dtype", "outer", "channels", "inner", "weight", "bias", "running")]


class CpuKernels:
    """The four phases for inputs of one shape, layout and dtype; `reference` says what each computes."""

    def __init__(self, library: ctypes.CDLL, layout: Any, weight: _Maybe, bias: _Maybe) -> None:
        self.layout, self.address = layout, ctypes.addressof(layout)
        self.functions: tuple[Callable[..., int], ...] = tuple(getattr(library, name) for name in _ARGUMENTS)
        self.sums = torch.empty(2 * layout.channels, dtype=torch.float64, device="cpu")
        self.packed = self.sums.new_empty(2 * layout.channels + 1)
        self.weight, self.bias = (None if t is None else torch.empty_like(t) for t in (weight, bias))

    def forward_reduce(self, x: Tensor, num_batches_tracked: _Maybe = None) -> Tensor:
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        packed = torch.empty_like(self.packed)
        if self.functions[0](self.address, torch.get_num_threads(), x.data_ptr(), packed.data_ptr()):
            raise RuntimeError(_FREED)
        return packed

    def forward_apply(
        self, x: Tensor, summed: Tensor, weight: _Maybe, bias: _Maybe, running: Running, eps: float
    ) -> tuple[Tensor, Tensor]:
        (mean, var, num_batches_tracked, momentum), pointers = running, []
        if momentum is None:
            momentum = 0.0 if num_batches_tracked is None else 1.0 / num_batches_tracked.item()
        y, statistics = torch.empty_like(x), torch.empty_like(summed)
        for t in (x, summed, weight, bias, mean, var, statistics, y):
            pointers.append(None if t is None else t.data_ptr())
        if self.functions[1](self.address, torch.get_num_threads(), momentum, eps, mean is not None, *pointers):
            raise RuntimeError(_FREED)
        if mean is not None and var is not None:
            torch.autograd.graph.increment_version((mean, var))
        return y, statistics

    def backward_reduce(
        self, dy: Tensor, x: Tensor, statistics: Tensor, weight_dtype: _Dtype, bias_dtype: _Dtype
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if num_dispatch_modes():  # they are to see all operators
            return reference.backward_reduce(dy, x, statistics, weight_dtype, bias_dtype)
        packed = torch.empty_like(self.sums)
        grad_weight = None if weight_dtype is None or self.weight is None else torch.empty_like(self.weight)
        grad_bias = None if bias_dtype is None or self.bias is None else torch.empty_like(self.bias)
        pointers = [dy.data_ptr(), x.data_ptr(), statistics.data_ptr(), packed.data_ptr()]
        for t in (grad_weight, grad_bias):
            pointers.append(0 if t is None else t.data_ptr())
        if self.functions[2](self.address, torch.get_num_threads(), *pointers):
            raise RuntimeError(_FREED)
        return packed, grad_weight, grad_bias

    def backward_apply(self, dy: Tensor, x: Tensor, statistics: Tensor, weight: _Maybe, summed: Tensor) -> Tensor:
        if num_dispatch_modes():
            return reference.backward_apply(dy, x, statistics, weight, summed)
        dx, address = torch.empty_like(x), 0  # of a weight that was freed, too
        if weight is not None and weight.untyped_storage().data_ptr():
            address = weight.data_ptr()
        pointers = dy.data_ptr(), x.data_ptr(), statistics.data_ptr(), address, summed.data_ptr(), dx.data_ptr()
        if self.functions[3](self.address, torch.get_num_threads(), *pointers):
            raise RuntimeError(_FREED)
        return dx


def kernels_for(x: Tensor, *per_channel: Tensor | None, quietly: bool = True) -> CpuKernels | None:
    """Return the kernels for ``x``, weight, bias, running_mean and running_var; None for what they do not read."""
    layout = _layout_of(x, *per_channel)
    if layout is None or not is_ready(quietly) or _library is None:
        return None
    return CpuKernels(_library, layout, *per_channel[:2])


def _layout_of(x: Tensor, *per_channel: Tensor | None) -> _Layout | None:
    if not x.is_cpu or not is_readable(x, *per_channel) or num_dispatch_modes() or jit_tracing_state() is not None:
        return None
    view = dense_view(x.shape, x.stride()) if not are_transforms_active() and x.data_ptr() else None
    if view is None:
        return None
    weight, bias, mean, _ = (-1 if t is None else KERNEL_DTYPES[t.dtype] for t in per_channel)
    return _Layout(KERNEL_DTYPES[x.dtype], *view, weight, bias, mean)


def is_ready(quietly: bool = True) -> bool:
    """Whether the library is built and right; the first call builds or loads it, says why not unless ``quietly``."""
    global _is_decided, _problem
    with _lock:
        if not _is_decided:
            try:
                _problem = _load()
            except Exception:  # a warning, where warnings are errors; but an interrupt decides nothing
                _is_decided = True
                raise
            _is_decided = True
    if _problem and not quietly:
        message, _problem = _problem, ""
        warnings.warn(message, RuntimeWarning, stacklevel=4)
    return _library is not None


def _load() -> str:
    """Build or load the library and check it; return what kept it from being built."""
    global _library
    try:
        library = build.load(Path(__file__).with_name("csrc") / "kernels.cpp")
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
    except Exception as error:  # of any kind: other kernels go on
        found = f"{type(error).__name__}: {error}. This process goes on with slower kernels."
        todo = "Install a C++ compiler, or name it in CXX; or choose SYNCBN_KERNELS=auto."
        return f"SYNCBN_KERNELS=cpu: expected to build or load the C++ kernels, got {found} {todo}"
    if selfcheck.passes(__name__, lambda *t: CpuKernels(library, _layout_of(*t), *t[1:3]), torch.device("cpu")):
        _library = library
    return ""
