"""Masks: which positions of a batch are valid, or how often each of them counts."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.checks import DTYPES, is_sparse
from ..ops.layout import SUM_DTYPE

_ADVICE = "expected a mask that is True, or a weight above 0, where input is valid"


class Weights(NamedTuple):
    """A mask as numbers."""

    values: Tensor  # (N, 1, *)
    padding: Tensor  # where they are 0
    total: Tensor  # their sum, float64; NaN if one is negative, infinite or NaN, so that all ranks get to know


def check_mask(mask: Tensor, x: Tensor) -> None:
    """Refuse a mask that does not go with ``x`` by its kind, shape or device; its numbers are checked in the exchange.

    Raises a ValueError.
    """
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.dtype in DTYPES) or is_sparse(mask):
        got = f"{mask.layout}, {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{_ADVICE}: a dense tensor of bool or a floating dtype, got {got}; as in ids != padding_id.")
    if mask.device != x.device:
        raise ValueError(f"{_ADVICE}: on the input's device {x.device}, got one on {mask.device}; move it there.")
    if mask.requires_grad:
        raise ValueError(f"{_ADVICE}, got one that requires a gradient, which weights have none of; detach it.")
    target = (x.shape[0], 1, *x.shape[2:])
    sizes = zip(reversed(mask.shape), reversed(target), strict=False)
    if mask.dim() > x.dim() or any(a != 1 and a != b for a, b in sizes):
        hint = "; put a dimension for the channels in, as in mask.unsqueeze(1)" if mask.dim() == x.dim() - 1 else ""
        shapes = f"broadcastable to (N, 1, *) = {target}, got {tuple(mask.shape)}"
        raise ValueError(f"{_ADVICE}: a tensor {shapes} for an input {tuple(x.shape)}{hint}.")


def weights_of(mask: Tensor, x: Tensor) -> Weights:
    """Turn a checked mask into weights of the positions of ``x``."""
    mask = mask.detach().expand(x.shape[0], 1, *x.shape[2:]).contiguous()  # so that outputs lie as x does
    values = mask.to(SUM_DTYPE.get(x.dtype, x.dtype))
    total = values.sum(dtype=torch.float64)
    if mask.dtype == torch.bool:
        return Weights(values, ~mask, total)
    is_usable = ((values >= 0) & values.isfinite()).all()
    return Weights(values, values <= 0, torch.where(is_usable, total, torch.nan))
