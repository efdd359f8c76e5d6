"""The running statistics of all BatchNorm layers of a model: found, summed over ranks, written."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from ..distributed.exchange import all_reduce, group_of
from ..distributed.groups import GroupSpec


def sum_over_ranks(caller: str, parts: list[Tensor]) -> list[Tensor]:
    """Sum float64 vectors over the world, each back to its device: one exchange."""
    packed, group = torch.cat([part.to(parts[0].device) for part in parts]), group_of(GroupSpec(None), caller)
    total = packed if group is None else all_reduce(packed, group, caller, "statistics")
    pieces = torch.split(total, [len(part) for part in parts])
    return [piece.to(part.device) for piece, part in zip(pieces, parts, strict=True)]


def layers_with_statistics(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorm layers with running statistics, by name; a ValueError for a lazy layer."""
    lazy = [name for name, layer in model.named_modules() if isinstance(layer, LazyModuleMixin)]
    if lazy:
        raise ValueError(f"the lazy layers {', '.join(lazy)} do not know their shapes yet: run one batch first.")
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    }


def statistics_of(layer: _BatchNorm) -> list[Tensor]:
    """Return running_mean and running_var; of a layer that keeps no variance the mean alone."""
    return [buffer for buffer in (layer.running_mean, layer.running_var) if buffer is not None]


def write(layer: _BatchNorm, *values: Tensor) -> None:
    """Write the running statistics: mean, and variance where the layer keeps one."""
    for buffer, value in zip(statistics_of(layer), values, strict=False):
        buffer.copy_(value)
