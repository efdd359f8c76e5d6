"""Freeze the statistics of BatchNorm layers: eval mode that survives ``model.train()``, for the last epochs.

Wu & Johnson 2021 ("Rethinking Batch in BatchNorm"), section 3.3, train the last epochs this way.
"""

import warnings
from functools import partial
from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

M = TypeVar("M", bound=nn.Module)

MODE_WHEN_UNFROZEN = "_mode_when_unfrozen"  # attribute of a frozen layer


def is_frozen(layer: nn.Module) -> bool:
    """Whether `freeze` keeps ``layer`` in eval mode."""
    return MODE_WHEN_UNFROZEN in layer.__dict__


def freeze(module: M) -> M:
    """Put every BatchNorm layer of ``module`` into eval mode and keep it there, whatever ``train()`` says.

    Running statistics normalize and no longer move; weight and bias go on learning. No collective runs any more.

    Raises:
        ValueError: If a layer has no running statistics, before any layer is frozen.
    """
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)}
    without = [name for name, layer in layers.items() if layer.running_mean is None]
    if without:
        raise ValueError(f"freeze: expected running statistics in every BatchNorm, got none in {', '.join(without)}.")
    if not layers:
        warnings.warn("syncbn.freeze found no BatchNorm layer.", stacklevel=2)
    for layer in layers.values():
        if not is_frozen(layer):
            layer.__dict__[MODE_WHEN_UNFROZEN] = layer.training
            layer.__dict__["train"] = partial(_train_frozen, layer)  # a partial copies and pickles with its layer
            layer.training = False
    return module


def unfreeze(module: M) -> M:
    """Undo `freeze`: every layer takes the mode it would have had without."""
    for layer in module.modules():
        if is_frozen(layer):
            del layer.__dict__["train"]
            layer.training = layer.__dict__.pop(MODE_WHEN_UNFROZEN)
    return module


def _train_frozen(layer: nn.Module, mode: bool = True) -> nn.Module:
    layer.__dict__[MODE_WHEN_UNFROZEN] = mode
    return layer
