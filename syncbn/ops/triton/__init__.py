"""The four phases on CUDA and ROCm in Triton: two launches forward, two backward, no wait for the device.

`kernels` are the kernels, `tiles` how their work is cut, `launch` how they are launched. With ``TRITON_INTERPRET=1``
and ``SYNCBN_KERNELS=triton`` they run on CPU tensors, in Triton's interpreter, which is how they are tested.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from ...private import is_traced
from .. import cuda, selfcheck
from ..layout import dense_view, is_readable
from .tiles import choose_splits, choose_tile

_passed: dict[tuple[object, ...], bool] = {}  # verdicts of the self-check: by device, then what is compiled for
_CAPTURED = "SyncBatchNorm: a CUDA graph is captured before steps of the same kind were run: with slower kernels."


def kernels_for(x: Tensor, *per_channel: Tensor | None, quietly: bool = True) -> Any:
    """Return the kernels for ``x``, weight, bias, running_mean and running_var; None for what they do not read.

    The first input of a kind compiles its kernels, within seconds, and compares them with the reference
    (`selfcheck.passes`), but not while a CUDA graph is captured: then other kernels serve.
    """
    device, view = x.device, (0, x.shape[1], 1) if x.numel() == 0 else dense_view(x.shape, x.stride())
    if view is None or not (device.type == "cuda" or (device.type == "cpu" and not quietly)):
        return None
    if not is_readable(x, *per_channel) or is_traced():
        return None
    try:
        from . import launch
    except Exception as error:  # of any kind: other kernels serve
        if not quietly:
            found = f"SYNCBN_KERNELS=triton: expected to import Triton, got {type(error).__name__}: {error}."
            warnings.warn(found, RuntimeWarning, stacklevel=4)
        return None
    if launch.IS_INTERPRETED != (device.type == "cpu"):  # noqa: SIM300
        return None
    if view[1] == 1 and view[0]:  # one channel is one row
        view = 1, 1, view[0] * view[2]
    tile, dtypes = choose_tile(*view, x.dtype), [None if t is None else t.dtype for t in per_channel]
    kind = (device, tile, x.dtype, *dtypes)
    if kind not in _passed and cuda.is_capturing():
        warnings.warn(_CAPTURED, RuntimeWarning, stacklevel=4)
        return None
    if kind not in _passed:
        is_trusted = all(passed for other, passed in _passed.items() if other[0] == device)
        _passed[kind] = False  # where warnings are errors, too
        # the very kernels that x needs, on a small input, three programs for every channel
        outer = 2 * tile.rows + 1
        small = (outer, 5 * tile.vector, 1) if tile.width == 1 else (outer, 5, 25 * tile.vector)
        _passed[kind] = is_trusted and selfcheck.passes(
            __name__, lambda x, *_: launch.TritonKernels(tile, small, (3, 3), x), device,
            [(x.dtype, small, torch.contiguous_format, dtypes)],
        )  # fmt: skip
    num_multiprocessors = 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
    splits = choose_splits(tile, *view, num_multiprocessors)
    return launch.TritonKernels(tile, view, splits, x) if _passed[kind] else None
