"""Keep DistributedDataParallel from overwriting the statistics of subgroups.

Before every training forward DDP copies rank 0's buffers to all ranks, unless it was made with
``forward_sync_buffers=False`` (recommended). Layers of the world group hold equal statistics everywhere, so that copy
changes nothing; layers of subgroups would lose theirs. DDP's copy at construction, by which every rank gets what
rank 0 loaded, stays as it is.
"""

import weakref
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

_told: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def keep_buffers_of(layers: Callable[[nn.Module], bool]) -> None:
    """Take the buffers of the chosen layers out of the running DDP module's copy per step; once per DDP module.

    To be called in a layer's forward: only there is it known which DDP module runs it, and under which names. The
    first step's copy has been made then; it repeats the one at construction. Not seen by a compiled model, which needs
    ``forward_sync_buffers=False``.
    """
    if torch.compiler.is_compiling():
        return
    ddp = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if ddp is None or ddp in _told:
        return
    for name, layer in ddp.module.named_modules(remove_duplicate=False):
        if layers(layer):
            prefix = f"{name}." if name else ""
            ddp.parameters_to_ignore.update(prefix + buffer for buffer, _ in layer.named_buffers(recurse=False))
    ddp._assign_modules_buffers()
    _told.add(ddp)
