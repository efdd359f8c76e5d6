"""The other norms that can take a BatchNorm's place, by the names that `convert` takes.

Each is made by a function from the BatchNorm layer and the norm's own keyword arguments. A norm without a name is the
user's own: a function of ``num_features`` and keyword arguments.
"""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from ..nn.affine import ChannelAffine
from ..nn.frozen import FrozenStatistics
from .synchronized import batch_renorm, switchable_norm

Norm = str | Callable[..., nn.Module]


def groupnorm(layer: _BatchNorm, num_groups: int = 32) -> nn.Module:
    """Make a GroupNorm: ``y = (x - mean) / sqrt(var + eps) * weight + bias`` per sample and group of channels.

    No batch enters, so there is nothing to synchronize. Same channels, eps, affine, device and dtype as ``layer``.
    Wu & He 2018, section 3.

    Raises:
        ValueError: If ``num_groups`` does not divide the number of channels.
    """
    channels = layer.num_features
    if num_groups < 1 or channels % num_groups:
        choices = [n for n in range(1, channels + 1) if channels % n == 0]
        raise ValueError(f"num_groups={num_groups} does not divide its {channels} channels; choose one of {choices}")
    if not layer.affine:
        return nn.GroupNorm(num_groups, channels, layer.eps, affine=False)
    device, dtype = layer.weight.device, layer.weight.dtype
    norm = nn.GroupNorm(num_groups, channels, layer.eps, True, device, dtype)
    if layer._parameters["bias"] is None:  # torch has a keyword for it from 2.13 on
        norm.register_parameter("bias", None)
    return norm


def layernorm(layer: _BatchNorm) -> nn.Module:
    """Make the GroupNorm of one group: over channels and positions of one sample.

    Weight and bias stay per channel. Ba et al. 2016; Wu & He 2018, section 3.1.
    """
    return groupnorm(layer, num_groups=1)


def instancenorm(layer: _BatchNorm) -> nn.Module:
    """Make the GroupNorm of one channel per group: over the positions of one channel.

    A map of a single value is its own mean, so it gives the bias; torch refuses that for a batch of one. Ulyanov et
    al. 2016.
    """
    return groupnorm(layer, num_groups=layer.num_features)


REGISTRY: dict[str, Callable[..., nn.Module]] = {
    "gn": groupnorm,
    "ln": layernorm,
    "in": instancenorm,
    "frozen": FrozenStatistics,
    "brn": batch_renorm,
    "sn": switchable_norm,
    "none": ChannelAffine,
}


def check(norm: Norm, options: dict[str, Any]) -> None:
    """Raise a ValueError for a norm that does not exist, listing those that do, or for arguments it does not take."""
    if callable(norm) and not isinstance(norm, nn.Module):
        return
    if not isinstance(norm, str) or norm not in {"bn", "syncbn", *REGISTRY}:
        raise ValueError(
            f"unknown norm {norm!r}: expected one of {', '.join(['bn', 'syncbn', *REGISTRY])}, or a class or function "
            "that makes a module from num_features."
        )
    known = [] if norm not in REGISTRY else list(signature(REGISTRY[norm]).parameters)[1:]
    known = [name for name in known if name != "process_group"]  # an argument of convert itself
    unknown = [name for name in options if name not in known]
    if unknown:
        choices = ", ".join(known) or "no keyword arguments"
        raise ValueError(f"norm {norm!r} takes {choices}, not {', '.join(unknown)}.")


def synchronizes(norm: Norm) -> bool:
    """Whether layers of ``norm`` have a process group."""
    return norm == "syncbn" or (norm in REGISTRY and "process_group" in signature(REGISTRY[norm]).parameters)


def make(norm: Norm, layer: nn.Module, options: dict[str, Any]) -> nn.Module:
    """Make the module of ``norm`` that takes the place of ``layer``, a BatchNorm, on its device and in its dtype.

    Raises:
        ValueError: If the user's norm gives something that cannot be put into the layer's place.
    """
    if isinstance(norm, str):
        return REGISTRY[norm](layer, **options)
    new = norm(layer.num_features, **options)
    if not isinstance(new, nn.Module):
        raise ValueError(f"{name_of(norm)} made a {type(new).__name__}, expected an nn.Module")
    hooks = [value for name, value in vars(new).items() if name.endswith("_hooks") and value]
    if hooks or is_parametrized(new) or isinstance(new, LazyModuleMixin):
        raise ValueError(f"{name_of(norm)} made a module that is lazy, parametrized or has hooks, which would be lost")
    if layer._modules and isinstance(new, nn.Sequential):
        raise ValueError(f"{name_of(norm)} made a Sequential, which would run the layer's drop and act; write a class")
    like = layer.running_mean if layer.weight is None else layer.weight
    new.train(layer.training)
    return new.to(like.device, like.dtype) if isinstance(like, Tensor) else new


def key(norm: Norm, options: dict[str, Any]) -> tuple[Any, ...]:
    """Return what tells conversions apart: the norm and its keyword arguments, also where a partial holds them."""
    if isinstance(norm, partial):
        return norm.func, norm.args, {**norm.keywords, **options}
    return norm, (), options


def name_of(norm: Norm) -> str:
    """Return the name to print."""
    norm = norm.func if isinstance(norm, partial) else norm
    return norm if isinstance(norm, str) else getattr(norm, "__name__", type(norm).__name__)
