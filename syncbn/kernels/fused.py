"""The four primitives on the CPU in C++: one pass over memory each, sums in float64.

`fused.cpp` is built on first use, within three seconds, and called by pointers, without torch's headers. Against
torch.compile of the reference this was measured: that takes 20 s for the first step, and a compilation for every kind
of input. Where nothing can be built, `supports` is False from then on.
"""

import ctypes
import sys
import threading
import warnings
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from . import build, reference, selfcheck

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # numbered as in fused.cpp
_PLAIN = (Tensor, torch.nn.Parameter)
_LONG, _POINTER = ctypes.c_long, ctypes.c_void_p
_SHAPE = [_LONG] * 5  # dtype, threads, outer, channels, inner
_CHANNEL = [_LONG, _POINTER]  # dtype, values
_ARGUMENTS = {
    "local_sums": [*_SHAPE, _POINTER, _POINTER],
    "normalize": [*_SHAPE, _POINTER, *_CHANNEL, _POINTER, *_CHANNEL, *_CHANNEL, _POINTER],
    "backward_sums": [*_SHAPE, _POINTER, _POINTER, *_CHANNEL, _POINTER, _POINTER],
    "input_gradient": [*_SHAPE, _POINTER, _POINTER, *_CHANNEL, _POINTER, *_CHANNEL, *[_POINTER] * 3],
    "advance": [_LONG, _POINTER, ctypes.c_double, *_CHANNEL, _POINTER, ctypes.c_double, *_CHANNEL, _POINTER],
}

# Private; in a torch without them `supports` is False.
_num_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_are_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)

_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_is_decided = False
_problem = ""  # what kept the library from being built, until somebody is told


def supports(x: Tensor, quietly: bool = False) -> bool:
    """Whether ``x`` is a plain tensor on the CPU, not empty, contiguous or channels last, that nobody traces.

    The first such ``x`` builds or loads the library and starts its self-check (`selfcheck.passes`). Where that cannot
    be, one warning says why, unless ``quietly``.
    """
    return (
        _is_plain(x)
        and not _is_traced()
        and x.numel() > 0
        and _layout(x.shape, x.stride()) is not None
        and x.data_ptr() != 0
        and not x.is_neg()  # x is the negative of what lies in memory
        and _is_ready(quietly)
    )


def local_sums(x: Tensor) -> Tensor:
    """Compute ``[sum, sqsum, count]`` of this rank; see `reference.local_sums`."""
    packed = torch.empty(2 * x.shape[1] + 1, dtype=torch.float64, device="cpu")
    _call("local_sums", x, x.data_ptr(), packed.data_ptr())
    return packed


def normalize(x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Compute ``y = (x - mean) * invstd * weight + bias``; see `reference.normalize`."""
    if not _fit(x.shape[1], mean, invstd, weight, bias):
        return reference.normalize(x, mean, invstd, weight, bias)
    y = torch.empty_like(x)
    _call("normalize", x, x.data_ptr(), *_pair(mean, invstd), *_channel(weight), *_channel(bias), y.data_ptr())
    return y


def advance(
    packed: Tensor,
    eps: float,
    dtype: torch.dtype,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    may_be_empty: bool,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Do what `moments.advance` does, or return None for what is not usual."""
    num_features, running = len(packed) // 2, [t for t in (running_mean, running_var) if t is not None]
    usual = not may_be_empty and isinstance(momentum, float) and len(running) != 1
    if _library is None or not (usual and _fit(num_features, *running)):
        return None
    if running and not running[0].dtype == running[1].dtype in (torch.float32, torch.float64):
        return None
    mean, invstd = torch.empty(2, num_features, dtype=dtype, device="cpu").unbind()
    pointers: list[int | None] = [t.data_ptr() for t in running] if running else [None, None]
    running_dtype = _DTYPES[running[0].dtype] if running else 0
    _library.advance(num_features, packed.data_ptr(), eps, *_pair(mean, invstd), momentum, running_dtype, *pointers)
    for t in running:
        if not t.is_inference():  # which have no version
            torch.autograd.graph.increment_version(t)
    return packed[-1], mean, invstd


def backward_sums(dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``sum_dy`` and ``sum_dy_xhat`` of this rank, float64; see `reference.backward_sums`."""
    if not (_matches(dy, x) and _fit(x.shape[1], mean, invstd)):
        return reference.backward_sums(dy, x, mean, invstd)
    dy = _like(dy, x)
    sums = torch.empty(2, x.shape[1], dtype=torch.float64, device="cpu")
    _call("backward_sums", x, dy.data_ptr(), x.data_ptr(), *_pair(mean, invstd), sums.data_ptr())
    sum_dy, sum_dy_xhat = sums.unbind()
    return sum_dy, sum_dy_xhat


def input_gradient(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, sums: Tensor, count: Tensor
) -> Tensor:
    """Compute ``dx = weight * invstd * (dy - sum_dy / n - xhat * sum_dy_xhat / n)``; see `reference`."""
    num_features = x.shape[1]
    sums, count = sums.double(), count.double()
    is_fit = _fit(num_features, mean, invstd, weight) and _fit(2 * num_features, sums) and _fit(1, count)
    if not (_matches(dy, x) and is_fit):
        return reference.input_gradient(dy, x, mean, invstd, weight, sums, count)
    dy, dx = _like(dy, x), torch.empty_like(x)
    local = dy.data_ptr(), x.data_ptr(), *_pair(mean, invstd), *_channel(weight)
    _call("input_gradient", x, *local, sums.data_ptr(), count.data_ptr(), dx.data_ptr())
    return dx


def _call(name: str, x: Tensor, *arguments: int | None) -> None:
    layout = _layout(x.shape, x.stride())
    assert layout is not None
    assert _library is not None
    getattr(_library, name)(_DTYPES[x.dtype], torch.get_num_threads(), *layout, *arguments)


@lru_cache(4096)
def _layout(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Return how a dense tensor lies in memory, as (outer, channels, inner); None if it is not dense in that way."""
    x = torch.empty(shape, device="meta").as_strided(shape, stride)
    if x.is_contiguous():
        return shape[0], shape[1], x.numel() // (shape[0] * shape[1])
    return (x.numel() // shape[1], shape[1], 1) if x.movedim(1, -1).is_contiguous() else None


def _is_plain(t: Tensor) -> bool:
    return type(t) in _PLAIN and t.is_cpu and t.dtype in _DTYPES and t.layout is torch.strided


def _is_traced() -> bool:
    """Whether somebody follows the operators, which would miss what is done here."""
    return bool(
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or _num_dispatch_modes()
        or _are_transforms_active()
    )


def _matches(dy: Tensor, x: Tensor) -> bool:
    return _is_plain(dy) and dy.shape == x.shape


def _fit(num: int, *channels: Tensor | None) -> bool:
    """Whether these can be read as ``num`` values; if not, the reference says what is wrong, or takes them."""
    for t in channels:  # a generator costs more, six times per layer and step
        if t is not None and not (_is_plain(t) and t.numel() == num and t.is_contiguous() and t.data_ptr()):
            return False
    return True


def _channel(t: Tensor | None) -> tuple[int, int | None]:
    return (0, None) if t is None else (_DTYPES[t.dtype], t.data_ptr())


def _pair(mean: Tensor, invstd: Tensor) -> tuple[int, int, int]:
    assert mean.dtype == invstd.dtype
    return _DTYPES[mean.dtype], mean.data_ptr(), invstd.data_ptr()


def _like(dy: Tensor, x: Tensor) -> Tensor:
    """Bring ``dy`` to the strides and dtype of ``x``, and into memory."""
    is_alike = dy.stride() == x.stride() and dy.dtype == x.dtype and dy.data_ptr() and not dy.is_neg()
    return dy if is_alike else torch.empty_like(x).copy_(dy)


def _is_ready(quietly: bool) -> bool:
    global _is_decided, _problem
    if not _is_decided:
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
        library = build.load(Path(__file__).with_name("fused.cpp"))
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
    except Exception as error:  # of any kind: other kernels go on
        return (
            f"SYNCBN_KERNELS=fused: expected to build or load the C++ kernels, got {type(error).__name__}: {error}. "
            "This process goes on with slower kernels. Install a C++ compiler, or name it in CXX; or choose "
            "SYNCBN_KERNELS=auto."
        )
    _library, is_right = library, False
    try:
        is_right = selfcheck.passes(sys.modules[__name__], torch.device("cpu"))
    finally:
        _library = library if is_right else None
    return ""
