"""What a training forward must know of the DistributedDataParallel module that runs it.

Before every training forward DDP copies rank 0's buffers to all ranks, unless it was made with
``forward_sync_buffers=False`` (recommended). Layers of the world group hold equal statistics everywhere, so that copy
changes nothing; layers of subgroups would lose theirs. DDP's copy at construction, by which every rank gets what
rank 0 loaded, stays as it is.
"""

import warnings
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from ..private import joins

_done: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def refuse_join(ddp: Any) -> None:
    """Refuse a training forward under ``DDP.join()``.

    Raises:
        ValueError: A rank that has run out of data answers DDP's collectives, not the layer's.
    """
    if joins(ddp):
        raise ValueError(
            "SyncBatchNorm cannot run under DDP.join(): a rank without data would not take part in the layers' "
            "exchanges. Give every rank the same number of steps; its batch may be smaller, or empty."
        )


def keep_from_copies(ddp: Any, is_subgroup_layer: Callable[[nn.Module], bool]) -> None:
    """Keep DDP's copy per step away from the statistics of subgroups.

    To be called in a layer's training forward: only there is it known which DDP module runs it, and under which names
    it knows the layers. The buffers of subgroup layers leave the copy per step with the first step, whose own copy has
    been made then: it repeats the one at construction (and undoes what was set per rank in between). Nothing is seen
    of a compiled model, which needs ``forward_sync_buffers=False``.

    Args:
        ddp: The module whose forward pass runs.
        is_subgroup_layer: Tells the layers to protect.
    """
    if ddp in _done:
        return
    _done.add(ddp)
    try:
        ignored, assign = ddp.parameters_to_ignore, ddp._assign_modules_buffers
    except AttributeError as error:
        warnings.warn(
            f"this torch does not let SyncBatchNorm keep the statistics of subgroups from DDP's copies ({error}); "
            "expected DistributedDataParallel(..., forward_sync_buffers=False)",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    for name, layer in ddp.module.named_modules(remove_duplicate=False):
        if is_subgroup_layer(layer):
            prefix = f"{name}." if name else ""
            ignored.update(prefix + buffer for buffer, _ in layer.named_buffers(recurse=False))
    assign()
