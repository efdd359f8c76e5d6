"""Refuse an input that does not fit its layer: what ``F.batch_norm`` refuses, on several processes as on one."""

import torch
from torch import Tensor

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MIXED = ((torch.float32, torch.float16), (torch.float32, torch.bfloat16))  # of layer and input


def check_input(
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    eps: float | None = None,
    num_features: int | None = None,
) -> None:
    """Refuse an input that does not fit the layer's tensors, or ``num_features`` where it has none.

    ``eps`` is to be given in training alone. Raises: see `functional.sync_batch_norm`.
    """
    parameter = running_mean if weight is None else weight
    if x.dim() < 2:
        raise ValueError(f"expected an input of 2 or more dimensions (N, C, *), got shape {tuple(x.shape)}.")
    if x.dtype not in _DTYPES:
        raise ValueError(f"expected an input of a floating dtype, got {x.dtype}; convert it, as in input.float().")
    if x.is_mps:
        raise ValueError("syncbn: the device 'mps' has no float64, in which the statistics travel; use CPU or CUDA.")
    channels = x.size(1)
    if parameter is not None:
        num_features = len(parameter)
    elif num_features is None:
        num_features = channels
    if channels == 0 or channels != num_features:
        wanted = num_features or "at least 1"
        raise ValueError(f"expected an input of {wanted} channels (N, C, *), got {channels} in {tuple(x.shape)}.")
    if eps is not None and eps <= 0:
        raise ValueError(f"expected eps to be positive in training, got {eps}.")
    if parameter is not None and parameter.dtype != x.dtype and (parameter.dtype, x.dtype) not in _MIXED:
        wanted = f"the layer's dtype {parameter.dtype}, or of a half type for a float32 layer"
        raise ValueError(f"expected an input of {wanted}, got {x.dtype}; convert one of them.")
