"""Normalize a batch that is spread over ranks: the layer as a function, and several layers with one exchange.

Checks and the case of one process stand here, the training step over several ranks in `autograd`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import debug, recompute
from .autograd import Layer, count_batch, normalize_batch
from .collectives import GroupSpec, ProcessGroupLike

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MIXED = ((torch.float32, torch.float16), (torch.float32, torch.bfloat16))  # of layer and input


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    process_group: ProcessGroupLike | GroupSpec = None,
) -> Tensor:
    """Normalize ``input`` with the statistics of the batch on all ranks of ``process_group``.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias`` per channel, equal to ``F.batch_norm`` of the ranks' inputs
    joined, for any split, uneven and empty ones included. Ioffe & Szegedy 2015, algorithm 1; Peng et al. 2018
    (MegDet), section 3.3.

    Collectives: in training, one exchange of 2C + 1 float64 numbers forward, and one of 2C backward if ``input``
    requires a gradient (which must be so on all ranks or on none). None if ``training`` is False, without a process
    group, or in a group of one: then this is ``F.batch_norm``.

    Args:
        input: ``(N, C, *)`` of float16, bfloat16, float32 or float64, the same dtype on every rank; N may be 0.
        running_mean: ``(C,)`` or None; updated in place in training.
        running_var: ``(C,)`` or None; updated in place in training, with the unbiased variance.
        weight: ``(C,)`` or None for 1.
        bias: ``(C,)`` or None for 0.
        training: Whether to use, and exchange, the statistics of the batch.
        momentum: Part of the batch in the new running statistics; a tensor is not read back to the host.
        eps: Added to the variance under the root.
        process_group: None for all ranks, a number of consecutive ranks, "node", a ProcessGroup or a DeviceMesh.

    Returns:
        A tensor of the shape, dtype and memory format of ``input``.

    Raises:
        ValueError: If ``input`` has another shape or dtype than stated (half types go with float32 parameters too),
            or a device without float64; if ``eps`` is not positive in training; on every rank alike, if all ranks
            together have one value per channel.
    """
    layer = Layer(input, running_mean, running_var, weight, bias, momentum, eps)
    check_layer(layer, training)
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps)
    return normalize([layer], process_group)[0]


def sync_batch_norm_coalesced(
    inputs: Sequence[Tensor],
    running_means: Sequence[Tensor | None],
    running_vars: Sequence[Tensor | None],
    weights: Sequence[Tensor | None] | None = None,
    biases: Sequence[Tensor | None] | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    process_group: ProcessGroupLike | GroupSpec = None,
) -> tuple[Tensor, ...]:
    """Normalize the inputs of k independent layers as k calls of `sync_batch_norm` would, with one exchange each way.

    For layers none of which waits for another: the main path and the shortcut of a residual block, the branches of an
    Inception block, the levels of a feature pyramid. Latency is paid once; the numbers are the same.

    Collectives: in training, one of the sum of 2C + 1 float64 numbers forward, and one of the sum of 2C backward, over
    the inputs that require a gradient. Gradients are computed when those of all outputs are there.

    Args:
        inputs: k inputs; shapes, channels and dtypes may differ.
        running_means: One ``(C,)`` or None for each.
        running_vars: One ``(C,)`` or None for each.
        weights: One ``(C,)`` or None for each, or None.
        biases: One ``(C,)`` or None for each, or None.
        training: Whether to use, and exchange, the statistics of the batches.
        momentum: As in `sync_batch_norm`, for all.
        eps: As in `sync_batch_norm`, for all.
        process_group: As in `sync_batch_norm`, for all.

    Returns:
        k tensors of the shapes, dtypes and memory formats of the inputs.

    Raises:
        ValueError: If the arguments are not of one length, or the inputs not on one device; and as `sync_batch_norm`.
    """
    nothing = [None] * len(inputs)
    columns: list[Sequence[Any]] = [inputs, running_means, running_vars, nothing if weights is None else weights]
    columns.append(nothing if biases is None else biases)
    if len({len(column) for column in columns}) != 1:
        names = ("inputs", "running_means", "running_vars", "weights", "biases")
        found = ", ".join(f"{len(column)} {name}" for name, column in zip(names, columns, strict=True))
        raise ValueError(f"expected one of each for every input, got {found}; write None where a layer has none.")
    rows = zip(*columns, strict=True)
    layers = [Layer(x, mean, var, weight, bias, momentum, eps) for x, mean, var, weight, bias in rows]
    for layer in layers:
        check_layer(layer, training)
    if training:
        return normalize(layers, process_group)
    return tuple(F.batch_norm(*layer[:5], False, 0.0, eps) for layer in layers)


def normalize(layers: Sequence[Layer], process_group: ProcessGroupLike | GroupSpec) -> tuple[Tensor, ...]:
    """Run the training step of independent layers whose arguments have been checked.

    Raises:
        ValueError: If several inputs are not on one device; on every rank alike, if all ranks together have one value
            per channel.
    """
    if len(layers) > 1 and len({layer.input.device for layer in layers}) > 1:
        devices = ", ".join(str(layer.input.device) for layer in layers)
        raise ValueError(f"expected inputs of one device, got {devices}; layers of several cannot share an exchange.")
    spec = process_group if isinstance(process_group, GroupSpec) else GroupSpec(process_group)
    try:
        group = spec.resolve()
    except RuntimeError as error:
        owners = [layer.owner for layer in layers]
        raise debug.explain(error, "when the process groups were made", owners) from error
    if group is None:
        return tuple(_one_process(count_batch(layer)) for layer in layers)
    return normalize_batch(layers, group) if layers else ()


def check_layer(layer: Layer, training: bool) -> None:
    """Refuse arguments of one layer, see `sync_batch_norm`."""
    parameter = layer.running_mean if layer.weight is None else layer.weight
    x = layer.input
    num_features = len(parameter) if parameter is not None else x.shape[1] if x.dim() > 1 else 0
    check_input(x, num_features, parameter, layer.eps if training else None)


def check_input(x: Tensor, num_features: int, parameter: Tensor | None, eps: float | None = None) -> None:
    """Refuse an input that does not fit the layer: what ``F.batch_norm`` refuses, on several processes as on one.

    Args:
        x: The input.
        num_features: Channels of the layer.
        parameter: One of its per-channel tensors, for the dtype; None if it has none.
        eps: Of the layer, in training.

    Raises:
        ValueError: See `sync_batch_norm`.
    """
    if x.dim() < 2:
        raise ValueError(f"expected an input of 2 or more dimensions (N, C, *), got shape {tuple(x.shape)}.")
    if x.dtype not in _DTYPES:
        raise ValueError(f"expected an input of a floating dtype, got {x.dtype}; convert it, as in input.float().")
    if x.is_mps:
        raise ValueError("syncbn: the device 'mps' has no float64, in which the statistics travel; use CPU or CUDA.")
    channels = x.size(1)
    if channels == 0 or channels != num_features:
        wanted = num_features or "at least 1"
        raise ValueError(f"expected an input of {wanted} channels (N, C, *), got {channels} in {tuple(x.shape)}.")
    if eps is not None and eps <= 0:
        raise ValueError(f"expected eps to be positive in training, got {eps}.")
    if parameter is not None and parameter.dtype != x.dtype and (parameter.dtype, x.dtype) not in _MIXED:
        raise ValueError(
            f"expected an input of the layer's dtype {parameter.dtype}, or of a half type for a float32 layer, "
            f"got {x.dtype}; convert one of them."
        )


def _one_process(layer: Layer) -> Tensor:
    input, running_mean, running_var, weight, bias, momentum, eps, _, _ = layer
    assert momentum is not None
    if recompute.is_recomputing():
        momentum = 0.0  # the first pass has moved the running statistics
    if not isinstance(momentum, Tensor) or running_mean is None or running_var is None:
        factor = 0.0 if isinstance(momentum, Tensor) else momentum
        return F.batch_norm(input, running_mean, running_var, weight, bias, True, factor, eps)
    # F.batch_norm takes a number: let it write the batch's own statistics, and average with the tensor.
    mean, var = running_mean.clone(), running_var.clone()
    y = F.batch_norm(input, mean, var, weight, bias, True, 1.0, eps)
    with torch.no_grad():
        running_mean.lerp_(mean, momentum.to(mean.dtype))
        running_var.lerp_(var, momentum.to(var.dtype))
    return y
