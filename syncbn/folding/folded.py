"""Put norms into the weight and bias of the layer before them: the arithmetic, and what is left of them."""

from collections import OrderedDict
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..conversion import patches
from ..conversion.frozen import eps_of
from ..conversion.original import original_of
from ..conversion.swap import restore
from ..conversion.third_party import activates, is_frozen_layer
from .readers import copy_of


def plain_copy(model: nn.Module, dtype: torch.dtype | None = None, stays: Container[str] = ()) -> nn.Module:
    """Copy ``model`` with its norms as the user wrote them, where that is the same in eval mode.

    Of norms that stay, "frozen" is kept: as written, they would move in training mode.
    """
    twin = copy_of(model)
    for name, layer in twin.named_modules():
        original = original_of(layer)
        if original is None or type(layer) is not original.swapped_to:
            continue
        norm = "syncbn" if original.norm is None else original.norm[0]
        if norm in ("syncbn", "bn") or (norm == "frozen" and name not in stays):
            patches.drop_copies(layer, original.cls)
            restore(layer)
    return twin if dtype is None else twin.to(dtype)


def fold_all(model: nn.Module, pairs: dict[str, str]) -> nn.Module:
    """Fold in place; raise for weights that their dtype cannot hold."""
    overflown = []
    for norm, name in pairs.items():
        layer = model.get_submodule(name)
        if not fold_pair(layer, model.get_submodule(norm)):
            overflown.append(f"{name} ({layer.weight.dtype}) with {norm}")
    if overflown:
        raise ValueError(
            f"fold: the folded weight or bias is not finite in {', '.join(overflown)}. If it is too large for a half "
            "type, fold model.float(); else look for NaN, or a variance of 0, in these layers."
        )
    return model


def scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Write ``norm`` in eval mode as one multiply-add ``y = x * scale + shift`` per channel, in float64.

    ``scale = weight / sqrt(running_var + eps)``, ``shift = bias - running_mean * scale``.
    """
    found = {name: getattr(norm, name, None) for name in ("weight", "bias", "running_mean", "running_var")}
    weight, bias, mean, var = (None if tensor is None else _wide(tensor) for tensor in found.values())
    eps: Any = eps_of(norm) if is_frozen_layer(norm) else norm.eps
    assert mean is not None
    assert var is not None
    scale = (var + eps).rsqrt() * (1 if weight is None else weight)
    return scale, (0 if bias is None else bias) - mean * scale


def folded(layer: nn.Module, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Compute weight and bias of ``layer`` with ``y * scale + shift`` per channel of its output, in float64."""
    weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
    assert weight is not None
    per_output = scale.view(-1, *[1] * (weight.dim() - 1))
    scaled = _by_output(layer, _by_output(layer, _wide(weight)) * per_output)
    return scaled, shift if bias is None else _wide(bias) * scale + shift


def fold_pair(layer: nn.Module, norm: nn.Module) -> bool:
    """Fold ``norm`` into ``layer``, in place; return whether the layer's dtype could hold the result."""
    weight, old_bias = layer._parameters["weight"], layer._parameters.get("bias")
    assert weight is not None
    values = folded(layer, *scale_and_shift(norm))
    biases = [p for p in (old_bias, norm._parameters.get("bias")) if p is not None] or [weight]
    wants = weight.requires_grad, any(p.requires_grad for p in biases)
    made = [torch.empty_like(weight), torch.empty_like(values[1], dtype=weight.dtype, device=weight.device)]
    for name, new, value, wants_grad in zip(("weight", "bias"), made, values, wants, strict=True):
        new = nn.Parameter(new, wants_grad)
        new.data.copy_(value)  # in the memory format of the old one
        layer.register_parameter(name, new)
    _leave(norm)
    return all(bool(torch.isfinite(parameter).all()) for parameter in layer.parameters(recurse=False))


def _leave(norm: nn.Module) -> None:
    """Make ``norm``, under all its names, an nn.Identity; of a fused layer what drops and activates."""
    rest: nn.Module = nn.Identity()
    if activates(type(norm)):
        parts = {name: module for name in ("drop", "act") if (module := norm._modules.get(name)) is not None}
        rest = nn.Sequential(OrderedDict(parts))
    rest.train(norm.training)
    norm.__dict__.clear()
    norm.__class__ = type(rest)
    norm.__dict__.update(rest.__dict__)


def _by_output(layer: nn.Module, weight: Tensor) -> Tensor:
    """Reorder the weight to have the channels of the output first, ``(out, in / groups, *)``; the second time, back.

    Only that of a transposed convolution has not: ``(in, out / groups, *)``.
    """
    if not isinstance(layer, _ConvNd) or not layer.transposed:
        return weight
    return weight.view(layer.groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)  # some devices have no float64
