"""Fold normalizations with running statistics into the convolution or linear layer before them: fold()."""

import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..compat import full_float32
from .agreement import verify
from .foldable import Found, find
from .folded import fold_all, plain_copy
from .problems import by_reason, problems_of
from .readers import copy_of_arguments

M = TypeVar("M", bound=nn.Module)

_HALF = (torch.float16, torch.bfloat16)
_NOTHING = (
    "fold: none of the norms can be folded. Change what is in the way, fold a part of the model in which one can be, "
    "choose an example that reaches it, or leave the model as it is."
)


def fold(model: M, example: Any) -> M:
    """Fold each BatchNorm of ``model`` into the convolution or linear layer before it; return that as a copy.

    In eval mode a BatchNorm is one multiply-add per channel, ``y = x * scale + shift`` with
    ``scale = weight / sqrt(running_var + eps)`` and ``shift = bias - running_mean * scale``. So is the copy's layer
    before it, whose weight becomes ``weight * scale`` (over the channels of its output) and whose bias becomes
    ``bias * scale + shift``: computed in float64, rounded once. The norm becomes an nn.Identity of the same name; of
    timm's fused layers dropout and activation stay.

    Norms converted to "syncbn" or "bn" that stay are as written in the copy, other ones what they are: "frozen" stays
    frozen. What they were is forgotten, so `revert` does nothing on the copy.

    Folded are BatchNorm layers of torch, syncbn and timm, frozen ones, and registered classes, behind nn.Conv1d to 3d,
    nn.ConvTranspose1d to 3d, with any groups, or nn.Linear on ``(N, F)``. Which feeds which is seen in one forward of
    ``example``: the very tensor that left the layer enters the norm, and nothing else reads it; both ran once, and
    neither has hooks. What ``example`` does not reach stays. One warning lists what stayed, and why.

    Then the copy's outputs on ``example`` are compared with the model's: in float32 for a half model, whose folded
    weights are rounded after that; and in float64, if they differ, with a warning where that is rounding.

    Collectives: none, so one rank alone may call it. Where statistics differ between ranks, as with plain BatchNorm or
    synchronized in subgroups, call `average_bn_stats` first.

    Args:
        model: A model in eval mode; it is not changed.
        example: An input, or a tuple of positional arguments, on the model's device.

    Raises:
        ValueError: For a model in training mode, lazy, wrapped, compiled, scripted or quantized; if it has norms, and
            none can be folded; if an output differs by more than 1e-5 of its range, or a folded weight overflows. It
            names the layers. What the model's forward raises goes through.

    Source: Jacob et al. 2018 (arXiv 1712.05877), section 3.2.

    Examples:
        >>> import torch, syncbn
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> folded = syncbn.fold(model, torch.randn(1, 3, 8, 8))
        >>> folded[1], type(model[1]).__name__
        (Identity(), 'BatchNorm2d')
    """
    args = example if isinstance(example, tuple) else (example,)
    if not isinstance(model, nn.Module):
        raise ValueError(f"fold: expected model to be an nn.Module, got {type(model).__name__}.")
    if not isinstance(example, tuple | Tensor):
        got = type(example).__name__
        raise ValueError(f"fold: expected example to be a tensor or a tuple of positional arguments, got {got}.")
    problems = problems_of(model)
    if problems:
        raise ValueError("\n".join(["fold: nothing was folded.", *by_reason(problems)]))
    tensors = (*model.parameters(), *model.buffers())
    dtype = torch.float32 if any(tensor.dtype in _HALF for tensor in tensors) else None
    with full_float32():
        found = find(plain_copy(model, dtype), copy_of_arguments(args, dtype))
        if found.stays and not found.pairs:
            raise ValueError("\n".join([_NOTHING, *by_reason(found.stays)]))
        remark = verify(model, found.pairs, found.output, args, dtype) if found.pairs else None
    if remark is not None:
        warnings.warn(remark, stacklevel=2)
    result = plain_copy(model, stays=found.stays)
    fold_all(result, found.pairs)
    for layer in result.modules():
        layer.__dict__.pop("_syncbn_original", None)
    _warn(found)
    return result  # type: ignore[return-value]


def _warn(found: Found) -> None:
    """List what stayed, by reason; and say so if there is nothing at all."""
    num = len(found.pairs) + len(found.stays)
    if found.stays:
        lines = by_reason(found.stays)
        text = "\n".join([f"syncbn.fold folded {len(found.pairs)} of {num} norms; these stayed:", *lines])
        warnings.warn(text, stacklevel=3)
    elif not num:
        warnings.warn("syncbn.fold found no layer with running statistics: the copy is as it was.", stacklevel=3)
