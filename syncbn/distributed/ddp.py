"""What a training forward must know of the DistributedDataParallel module that runs it.

Before every training forward DDP copies rank 0's buffers to all ranks, unless made with ``forward_sync_buffers=False``
(recommended): layers of subgroups would lose their statistics. Its copy at construction stays as it is.
"""

import warnings
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from ..private import joins

_done: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def refuse_join(ddp: Any) -> None:
    """Refuse a training forward under ``DDP.join()`` with a ValueError."""
    if joins(ddp):
        raise ValueError(
            "SyncBatchNorm cannot run under DDP.join(): a rank without data would not take part in the layers' "
            "exchanges. Give every rank the same number of steps; its batch may be smaller, or empty."
        )


def keep_from_copies(ddp: Any, is_subgroup_layer: Callable[[nn.Module], bool]) -> None:
    """Keep DDP's copy per step away from the statistics of subgroups, in the first forward pass of ``ddp``.

    Its copy in that step has been made then: it repeats the one at construction (and undoes what was set per rank in
    between). Nothing is seen of a compiled model, which needs ``forward_sync_buffers=False``.
    """
    if ddp in _done:
        return
    _done.add(ddp)
    try:
        ignored, assign = ddp.parameters_to_ignore, ddp._assign_modules_buffers
    except AttributeError as error:
        found = f"this torch does not let SyncBatchNorm keep the statistics of subgroups from DDP's copies ({error})"
        todo = "expected DistributedDataParallel(..., forward_sync_buffers=False)"
        warnings.warn(f"{found}; {todo}", RuntimeWarning, stacklevel=2)
        return
    for name, layer in ddp.module.named_modules(remove_duplicate=False):
        if is_subgroup_layer(layer):
            prefix = f"{name}." if name else ""
            ignored.update(prefix + buffer for buffer, _ in layer.named_buffers(recurse=False))
    assign()
