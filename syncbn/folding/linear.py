"""Try whether a layer that may compute anything is linear in its weight and bias, as folding takes it to be."""

import copy
from typing import Any

import torch
from torch import nn

from .agreement import TOLERANCE, error_of
from .folded import fold_pair
from .readers import copy_of, tensors

_SCALES = (1, -1, 1e3, 1e6)  # one alone might miss what is clamped, say


def is_of_torch(layer: nn.Module) -> bool:
    """Whether ``layer`` is of a class of torch.nn, with no method of it set on the instance (``_conv_forward``)."""
    is_changed = any(callable(value) and hasattr(type(layer), name) for name, value in vars(layer).items())
    return type(layer).__module__.startswith("torch.nn.") and not is_changed


def is_linear(layer: nn.Module, norm: nn.Module, args: tuple[Any, ...]) -> bool:
    """Try ``layer`` and ``norm``, folded and not, on the input of ``layer`` at several scales."""
    pair = copy_of(nn.ModuleList([layer, norm]))
    norm_left, folded = pair.get_submodule("1"), pair.get_submodule("0")
    fold_pair(folded, norm_left)
    try:
        with torch.no_grad():
            return all(
                error_of(norm_left(folded(*_scaled(args, scale))), norm(layer(*_scaled(args, scale)))) <= TOLERANCE
                for scale in _SCALES
            )
    except Exception:  # of a forward that wants keyword arguments, say
        return False


def _scaled(args: tuple[Any, ...], scale: float) -> tuple[Any, ...]:
    return copy.deepcopy(args, {id(t): t * scale if t.is_floating_point() else t.clone() for t in tensors(args)})
