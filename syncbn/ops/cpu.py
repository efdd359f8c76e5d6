"""The four primitives on the CPU in C++: one pass over memory each, sums in float64.

`fused.cpp` is built on first use, within three seconds, and called by pointers, without torch's headers. Against
torch.compile of the reference this was measured: that takes 20 s for the first step, and a compilation for every kind
of input. Where nothing can be built, `supports` is False from then on.
"""

import ctypes
import struct
import sys
import threading
import warnings
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..private import are_transforms_active, num_dispatch_modes
from . import build, reference, selfcheck

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # numbered as in fused.cpp
_PLAIN = (Tensor, torch.nn.Parameter)
_LAYOUT, _CHANNEL = "5q", "qQ"  # dtype, threads, outer, channels, inner; dtype, values
_ARGUMENTS = {  # one packed struct each: ctypes takes longer for an argument than for such a call
    "local_sums": struct.Struct(_LAYOUT + "2Q"),
    "normalize": struct.Struct(_LAYOUT + 4 * _CHANNEL + "2Q"),
    "backward_sums": struct.Struct(_LAYOUT + 2 * _CHANNEL + "3Q"),
    "input_gradient": struct.Struct(_LAYOUT + 3 * _CHANNEL + "5Q"),
    "advance": struct.Struct("qQ2d" + 4 * _CHANNEL),
}

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
        and not is_traced()
        and x.numel() > 0
        and _layout(x.shape, x.stride()) is not None
        and x.data_ptr() != 0
        and not x.is_neg()  # x is the negative of what lies in memory
        and is_ready(quietly)
    )


def local_sums(x: Tensor) -> Tensor:
    """Compute ``[sum, sqsum, count]`` of this rank; see `reference.local_sums`."""
    packed = torch.empty(2 * x.shape[1] + 1, dtype=torch.float64, device="cpu")
    _call("local_sums", *_describe(x), x.data_ptr(), packed.data_ptr())
    return packed


def normalize(x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Compute ``y = (x - mean) * invstd * weight + bias``; see `reference.normalize`."""
    channel = _channel(x.shape[1], mean, invstd, weight, bias)
    if channel is None:
        return reference.normalize(x, mean, invstd, weight, bias)
    y = torch.empty_like(x)
    _call("normalize", *_describe(x), *channel, x.data_ptr(), y.data_ptr())
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
    num_features = len(packed) // 2
    if (
        _library is None
        or may_be_empty
        or isinstance(momentum, Tensor)
        or (running_mean is None) != (running_var is None)
    ):
        return None
    running = [t for t in (running_mean, running_var) if t is not None]
    if any(t.is_inference() for t in running) and not torch.is_inference_mode_enabled():
        return None  # they refuse to be changed
    mean, invstd = torch.empty((2, num_features), dtype=dtype, device="cpu").unbind()
    channel = _channel(num_features, mean, invstd, running_mean, running_var)
    if channel is None or channel[4] != channel[6] or channel[4] > 1:  # half types, or two
        return None
    _call("advance", num_features, packed.data_ptr(), eps, momentum, *channel)
    for t in running:
        if not t.is_inference():  # which has no version
            torch.autograd.graph.increment_version(t)
    return packed[-1], mean, invstd


def backward_sums(dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``sum_dy`` and ``sum_dy_xhat`` of this rank, float64; see `reference.backward_sums`."""
    channel = _channel(x.shape[1], mean, invstd)
    if channel is None or not _matches(dy, x):
        return reference.backward_sums(dy, x, mean, invstd)
    dy = _like(dy, x)
    sums = torch.empty((2, x.shape[1]), dtype=torch.float64, device="cpu")
    _call("backward_sums", *_describe(x), *channel, dy.data_ptr(), x.data_ptr(), sums.data_ptr())
    sum_dy, sum_dy_xhat = sums.unbind()
    return sum_dy, sum_dy_xhat


def input_gradient(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, sums: Tensor, count: Tensor
) -> Tensor:
    """Compute ``dx = weight * invstd * (dy - sum_dy / n - xhat * sum_dy_xhat / n)``; see `reference`."""
    num_features = x.shape[1]
    sums, count = sums.double(), count.double()
    channel = _channel(num_features, mean, invstd, weight)
    all_ranks = _channel(2 * num_features, sums), _channel(1, count)
    if channel is None or None in all_ranks or not _matches(dy, x):
        return reference.input_gradient(dy, x, mean, invstd, weight, sums, count)
    dy, dx = _like(dy, x), torch.empty_like(x)
    pointers = (t.data_ptr() for t in (dy, x, sums, count, dx))
    _call("input_gradient", *_describe(x), *channel, *pointers)
    return dx


def _call(name: str, *arguments: float) -> None:
    assert _library is not None
    getattr(_library, name)(_ARGUMENTS[name].pack(*arguments))


def _describe(x: Tensor) -> tuple[int, ...]:
    layout = _layout(x.shape, x.stride())
    assert layout is not None
    return _DTYPES[x.dtype], torch.get_num_threads(), *layout


@lru_cache(4096)
def _layout(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Return how a dense tensor lies in memory, as (outer, channels, inner); None if it is not dense in that way."""
    x = torch.empty(shape, device="meta").as_strided(shape, stride)
    if x.is_contiguous():
        return shape[0], shape[1], x.numel() // (shape[0] * shape[1])
    return (x.numel() // shape[1], shape[1], 1) if x.movedim(1, -1).is_contiguous() else None


def _is_plain(t: Tensor) -> bool:
    return type(t) in _PLAIN and t.is_cpu and t.dtype in _DTYPES and t.layout is torch.strided


def is_traced() -> bool:
    """Whether somebody follows the operators, which would miss what is done here."""
    return bool(
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or num_dispatch_modes()
        or are_transforms_active()
    )


def _matches(dy: Tensor, x: Tensor) -> bool:
    return _is_plain(dy) and dy.shape == x.shape


def _channel(num: int, *tensors: Tensor | None) -> list[int] | None:
    """Return dtype and address of each; None if one cannot be read as ``num`` values: `reference` says why."""
    found: list[int] = []
    for t in tensors:  # six times per layer and step: no generators, no calls
        if t is None:
            found += (0, 0)
        elif type(t) in _PLAIN and t.is_cpu and t.dtype in _DTYPES and t.numel() == num and t.is_contiguous():
            found += (_DTYPES[t.dtype], t.data_ptr())
            if not found[-1]:
                return None
        else:
            return None
    return found


def _like(dy: Tensor, x: Tensor) -> Tensor:
    """Bring ``dy`` to the strides and dtype of ``x``, and into memory."""
    is_alike = dy.stride() == x.stride() and dy.dtype == x.dtype and dy.data_ptr() and not dy.is_neg()
    return dy if is_alike else torch.empty_like(x).copy_(dy)


def is_ready(quietly: bool = True) -> bool:
    """Whether the library is there and right; the first call builds or loads it, says why not unless ``quietly``."""
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
        for name in _ARGUMENTS:
            function = getattr(library, name)
            function.argtypes, function.restype = [ctypes.c_char_p], None
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
