"""The four phases on CUDA and ROCm in Triton: two launches forward, two backward, no wait for the device.

With ``TRITON_INTERPRET=1`` and ``SYNCBN_KERNELS=triton`` they run on CPU tensors, in Triton's interpreter, for tests.
"""

import threading
import warnings
from typing import Any

import torch
from torch import Tensor

from ...private import is_traced
from .. import cuda, selfcheck
from ..layout import dense_view, is_readable
from .tiles import choose_splits, choose_tile

_passed: dict[tuple[object, ...], bool] = {}  # verdicts of the self-check: by device, then what is compiled for
_lock = threading.Lock()


def kernels_for(x: Tensor, *per_channel: Tensor | None, quietly: bool = True) -> Any:
    """Return the kernels for ``x``, weight, bias, running_mean and running_var; None for what they do not read.

    The first input of a kind compiles its kernels, within seconds, and checks them. While a CUDA graph is captured,
    other kernels serve what was not seen before.
    """
    if (x.device.type != "cuda" and (quietly or not x.is_cpu)) or not is_readable(x, *per_channel):
        return None
    view = (0, x.shape[1], 1) if x.numel() == 0 else dense_view(x.shape, x.stride())
    if view is None or is_traced() or (launch := _import(x.device, quietly)) is None:
        return None
    if cuda.is_capturing():
        found = "SyncBatchNorm: a CUDA graph is captured before steps of the same kind were run: with slower kernels."
        warnings.warn(found, RuntimeWarning, stacklevel=4)
        return None
    if view[1] == 1 and view[0]:  # one channel is one row
        view = 1, 1, view[0] * view[2]
    tile, dtypes = choose_tile(*view, x.dtype), [None if t is None else t.dtype for t in per_channel]
    kind = (x.device, tile, x.dtype, *dtypes)
    # the very kernels that x needs, on a small input of two blocks of channels, with three programs of several tiles
    inner, outer = (1, 6 * tile.rows + 1) if tile.width == 1 else (tile.width + tile.vector, 3 * tile.rows + 1)
    small = outer, tile.block + tile.vector, inner
    with _lock:
        if kind not in _passed:
            is_trusted = all(passed for other, passed in _passed.items() if other[0] == x.device)
            try:
                _passed[kind] = is_trusted and selfcheck.passes(
                    __name__, lambda x, *_: launch.TritonKernels(tile, small, (3, 3), x), x.device,
                    [(x.dtype, small, torch.contiguous_format, dtypes)],
                )  # fmt: skip
            except Exception:  # a warning, where warnings are errors; but an interrupt decides nothing
                _passed[kind] = False
                raise
    num_multiprocessors = 1 if x.is_cpu else torch.cuda.get_device_properties(x.device).multi_processor_count
    splits = choose_splits(tile, *view, num_multiprocessors)
    return launch.TritonKernels(tile, view, splits, x) if _passed[kind] else None


def _import(device: torch.device, quietly: bool) -> Any:
    """Import what needs Triton; None where it is not for this device, or missing."""
    try:
        from . import launch

        if (device.type == "cpu") == launch.IS_INTERPRETED:
            return launch
        found = f"tensors on {device.type}; TRITON_INTERPRET=1 is for those on the CPU, and there it must be set"
    except Exception as error:  # of any kind: other kernels serve
        found = f"{type(error).__name__}: {error}"
    if not quietly:
        warnings.warn(f"SYNCBN_KERNELS=triton: expected Triton to serve, got {found}.", RuntimeWarning, stacklevel=5)
    return None
