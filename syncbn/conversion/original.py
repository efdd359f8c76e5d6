"""What a converted layer was, kept on the layer itself."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .companions import Companion


@dataclass
class Original:
    """What a swapped layer was; kept on the layer as ``_syncbn_original``, outside of its state_dict."""

    cls: type[nn.Module]
    swapped_to: type[nn.Module]
    norm: tuple[Any, ...] | None = None  # the norm and its keyword arguments (`registry.key`); None for "syncbn"
    sync_state: dict[str, Any] = field(default_factory=dict)  # what a layer that was a SyncBatchNorm kept on itself
    frozen: dict[str, Any] | None = None  # of a FrozenBatchNorm2d: what `frozen.freeze_again` takes
    attributes: dict[str, Any] = field(default_factory=dict)  # taken away or overwritten
    added: list[str] = field(default_factory=list)  # attributes it did not have
    members: dict[str, dict[str, Any]] = field(default_factory=dict)  # parameters, buffers, modules, if exchanged
    dtype: torch.dtype | None = None  # of what it was swapped to, then
    companions: list[Companion] = field(default_factory=list)  # other modules that changed with it


def original_of(layer: nn.Module) -> Original | None:
    """Return what a swapped layer was, None for one that is as the user wrote it."""
    return layer.__dict__.get("_syncbn_original")


def original_class(layer: nn.Module) -> type[nn.Module]:
    """Return the class that the user wrote, also for a swapped layer."""
    original = original_of(layer)
    return type(layer) if original is None else original.cls
