"""How a tensor lies in memory, for every back end that reads memory itself."""

import math
from functools import lru_cache

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)  # types; a subclass may mean something else
SUM_DTYPE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}  # of the passes over x; else its own
KERNEL_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # numbered as in kernels.cpp
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@lru_cache(4096)
def dense_view(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, int, int] | None:
    """See a dense tensor ``(N, C, *)`` as ``(outer, channels, inner)``: ``(N, C, L)``, or ``(N * L, C, 1)`` if its
    channels come last; None for all else, and for a tensor without values.
    """
    count, rest = math.prod((shape[0], *shape[2:])), range(2, len(shape))
    if not count:
        return None
    for order, view in (
        ((0, 1, *rest), (shape[0], shape[1], count // shape[0])),
        ((0, *rest, 1), (count, shape[1], 1)),
    ):
        step = 1
        for dim in reversed(order):
            if shape[dim] != 1 and stride[dim] != step:
                break
            step *= shape[dim]
        else:
            return view
    return None


def is_readable(x: Tensor, *per_channel: Tensor | None) -> bool:
    """Whether kernels can read ``x``, weight, bias and running statistics from memory, and write the latter."""
    present, (*_, mean, var) = [t for t in per_channel if t is not None], per_channel
    for t in (x, *present):
        if type(t) not in PLAIN or t.dtype not in KERNEL_DTYPES or t.layout is not torch.strided:
            return False
        if t.is_neg() or t.device != x.device:  # of a negative view memory holds the opposite
            return False
    if not all(t.shape == (x.shape[1],) and t.is_contiguous() for t in present):
        return False
    if mean is None or var is None:
        return mean is var
    # statistics made in inference mode have no version to be raised
    return mean.dtype == var.dtype and not mean.is_inference() and not var.is_inference()


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the memory format of a dense tensor, as torch names it."""
    last = _CHANNELS_LAST.get(x.dim(), torch.contiguous_format)
    return last if not x.is_contiguous() and x.is_contiguous(memory_format=last) else torch.contiguous_format


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Shape per-channel values ``(C,)`` as ``(1, C, 1, …)``."""
    return values.view(1, -1, *[1] * (x.dim() - 2))
