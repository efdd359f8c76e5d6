"""Refuse an input that does not fit its layer: what ``F.batch_norm`` refuses, on several processes as on one."""

import torch
from torch import Tensor

from ..private import assert_in_graph
from .cuda import is_capturing

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
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
    if is_sparse(x):
        kind = "nested" if x.is_nested else x.layout
        raise ValueError(f"expected a dense input (N, C, *), got {kind}; normalize its values, or pad it with a mask.")
    kinds = {type(t).__name__ == "DTensor" for t in (x, weight, running_mean) if t is not None}
    if True in kinds and (eps is not None or False in kinds):
        how = "of an input sharded over the batch give input.to_local(), and call layers through the sharded module"
        raise ValueError(f"expected plain tensors (or in eval mode DTensors alone), got a DTensor; {how}.")
    parameter = running_mean if weight is None else weight
    if x.dim() < 2:
        raise ValueError(f"expected an input of 2 or more dimensions (N, C, *), got shape {tuple(x.shape)}.")
    if x.dtype not in DTYPES:
        how = "torch.view_as_real(input)" if x.is_complex() else "input.float()"
        raise ValueError(f"expected an input of a floating dtype of 16 to 64 bits, got {x.dtype}; convert it: {how}.")
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


def is_sparse(x: Tensor) -> bool:
    """Whether ``x`` is sparse or nested."""
    return x.is_nested or x.layout not in (torch.strided, getattr(torch, "_mkldnn", None))


def refuse_count(count: Tensor) -> None:
    """Refuse a number of values per channel over all ranks, which each of them knows, without an unbiased variance.

    0 is right: nothing moves. It is read on the host, but for a graph's assertion. Raises a ValueError.
    """
    text, where = "Expected more than 1 value per channel when training, got", "over all ranks of the process group"
    if torch.compiler.is_compiling() or is_capturing():
        assert_in_graph((count == 0) | (count > 1), f"{text} 1 (or weights below 0) {where}")
        return
    value = count.item()
    if value != value:  # NaN, see `plain.mask`
        raise ValueError(f"expected the weights of a mask to be 0 or more, and finite, got others {where}.")
    if 0 < value <= 1:
        hint = "" if value == 1 else "; the weights of a mask count as numbers of values"
        raise ValueError(f"{text} {value:g} {where}{hint}. Use a larger batch or eval mode.")
