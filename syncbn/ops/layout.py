"""How a tensor lies in memory, for every back end that reads memory itself."""

from functools import lru_cache

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)  # types; a subclass may mean something else
SUM_DTYPE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}  # of the passes over x; else its own
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@lru_cache(4096)
def dense_view(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, int, int] | None:
    """See a dense tensor ``(N, C, *)`` as ``(outer, channels, inner)`` of contiguous memory.

    Contiguous: ``(N, C, values per channel and sample)``; channels last: ``(values, C, 1)``; None for all else, and
    for a tensor without values.
    """
    count, rest = 1, range(2, len(shape))
    for size in (shape[0], *shape[2:]):
        count *= size
    if not count:
        return None
    if _is_dense(shape, stride, (0, 1, *rest)):
        return shape[0], shape[1], count // shape[0]
    return (count, shape[1], 1) if _is_dense(shape, stride, (0, *rest, 1)) else None


def _is_dense(shape: tuple[int, ...], stride: tuple[int, ...], order: tuple[int, ...]) -> bool:
    expected = 1
    for dim in reversed(order):
        if shape[dim] != 1 and stride[dim] != expected:
            return False
        expected *= shape[dim]
    return True


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the memory format of a dense tensor, as torch names it."""
    last = _CHANNELS_LAST.get(x.dim())
    is_last = last is not None and not x.is_contiguous() and x.is_contiguous(memory_format=last)
    return last if is_last and last is not None else torch.contiguous_format


def has_memory_format(x: Tensor) -> bool:
    """Whether ``x`` is contiguous, or channels last in torch's sense (4 or 5 dimensions)."""
    return x.is_contiguous() or memory_format(x) is not torch.contiguous_format


def like(dy: Tensor, x: Tensor) -> Tensor:
    """Return ``dy`` in the strides of ``x``: itself, or a copy."""
    return dy if dy.stride() == x.stride() else torch.empty_like(x).copy_(dy)


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Shape per-channel values ``(C,)`` as ``(1, C, 1, …)``."""
    return values.view(1, -1, *[1] * (x.dim() - 2))
