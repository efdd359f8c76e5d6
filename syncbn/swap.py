"""Turn a normalization layer into another kind in place, and back.

The module object stays; only its class, and what belongs to that class, is exchanged. So parameter objects, hooks,
aliases, the training flag and the user's own attributes need no copying, and the way back is exact.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .batchnorm import SyncBatchNorm
from .collectives import GroupSpec

_MODULE_STATE = frozenset(nn.Module().__dict__)


@dataclass
class Original:
    """What a turned layer was; kept on the layer as ``_syncbn_original``, outside of its state_dict."""

    cls: type[nn.Module]
    turned_into: type[nn.Module]
    norm: tuple[str, dict[str, Any]] | None = None  # its name and words; None for "syncbn"
    attributes: dict[str, Any] = field(default_factory=dict)  # taken away or overwritten
    added: list[str] = field(default_factory=list)  # attributes it did not have
    members: dict[str, dict[str, Any]] = field(default_factory=dict)  # parameters, buffers, modules, if exchanged
    dtype: torch.dtype | None = None  # of the weight, then


def original_of(layer: nn.Module) -> Original | None:
    """Return what a turned layer was, None for one that is as the user wrote it."""
    return layer.__dict__.get("_syncbn_original")


def original_class(layer: nn.Module) -> type[nn.Module]:
    """Return the class that the user wrote, also for a turned layer."""
    original = original_of(layer)
    return type(layer) if original is None else original.cls


def to_sync(
    layer: nn.Module,
    sync_class: type[SyncBatchNorm],
    spec: GroupSpec,
    norm: tuple[str, dict[str, Any]] | None = None,
) -> None:
    """Turn a layer of the BatchNorm family into ``sync_class``; its parameters and buffers stay as they are."""
    original = Original(type(layer), sync_class, norm)
    if "process_group" in layer.__dict__:  # nn.SyncBatchNorm's; as a spec it can be copied and pickled
        original.attributes["process_group"] = GroupSpec(layer.__dict__.pop("process_group"))
    if "_group_spec" in layer.__dict__:
        original.attributes["_group_spec"] = layer.__dict__["_group_spec"]
    _set_class(layer, original)
    layer.__dict__["_group_spec"] = spec


def frozen_to_sync(layer: nn.Module, sync_class: type[SyncBatchNorm], spec: GroupSpec) -> None:
    """Turn a FrozenBatchNorm2d into ``sync_class``: its weight and bias, which are buffers, become parameters."""
    mean = layer._buffers["running_mean"]
    assert mean is not None
    attributes = _attributes(sync_class(len(mean), device="meta"))
    added = [name for name in attributes if name not in layer.__dict__]
    _set_class(layer, Original(type(layer), sync_class, added=added))
    layer.__dict__.update({name: attributes[name] for name in added} | {"_group_spec": spec})
    for name in ("weight", "bias"):
        buffer = layer._buffers.pop(name)
        assert buffer is not None
        layer.register_parameter(name, nn.Parameter(buffer))
    layer.register_buffer("num_batches_tracked", torch.tensor(0, device=mean.device))


def to_other(layer: nn.Module, new: nn.Module, norm: tuple[str, dict[str, Any]], activate: bool = False) -> None:
    """Turn ``layer`` into what ``new`` is, keeping the parameter objects of the names that both have.

    Args:
        layer: A layer of the BatchNorm family.
        new: A fresh module whose class, attributes and buffers ``layer`` gets.
        norm: Its name and words, kept so that converting again to the same changes nothing.
        activate: Whether ``layer`` drops and activates after normalizing, as timm's fused layers do: kept as a hook.
    """
    attributes = _attributes(new)
    original = Original(
        type(layer),
        type(new),
        norm,
        {name: layer.__dict__[name] for name in attributes if name in layer.__dict__},
        [name for name in attributes if name not in layer.__dict__],
        {kind: dict(layer.__dict__[kind]) for kind in ("_parameters", "_buffers", "_modules")},
        getattr(layer.weight, "dtype", None),
    )
    parameters = {name: _either(layer._parameters.get(name), p) for name, p in new._parameters.items()}
    _set_class(layer, original)
    layer.__dict__.update(attributes)
    layer.__dict__.update(_parameters=parameters, _buffers=dict(new._buffers))
    layer._modules.update(new._modules)
    if activate:
        layer.register_forward_hook(_activate, prepend=True)


def turn_back(layer: nn.Module) -> None:
    """Make a turned layer exactly what the user wrote: class, attributes and buffers; parameters as trained."""
    original = original_of(layer)
    if original is None:
        return
    for key in [key for key, hook in layer._forward_hooks.items() if hook is _activate]:
        del layer._forward_hooks[key]
    layer.__class__ = original.cls
    if not issubclass(original.cls, SyncBatchNorm):
        layer.__dict__.pop("_group_spec", None)
    for name in ["_syncbn_original", *original.added]:
        layer.__dict__.pop(name, None)
    for name, value in original.attributes.items():
        layer.__dict__[name] = _group_of(value) if name == "process_group" else value
    if original.members:
        _restore_members(layer, original)
    elif original.cls.__name__.startswith("FrozenBatchNorm"):
        _freeze_again(layer)


def to_batchnorm(layer: SyncBatchNorm) -> None:
    """Turn a layer that was written as a SyncBatchNorm into the nn.BatchNorm of its last input's dimensions."""
    by_dims = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    layer.__class__ = by_dims.get(layer.__dict__.pop("_input_dims", 4), nn.BatchNorm2d)  # type: ignore[assignment]
    layer.__dict__.pop("_group_spec")


def _set_class(layer: nn.Module, original: Original) -> None:
    layer.__class__ = original.turned_into
    layer.__dict__["_syncbn_original"] = original


def _activate(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Do what a fused layer does after normalizing; a forward hook of what takes its place."""
    y: Tensor = layer.act(layer.drop(output))  # type: ignore[operator]
    return y


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in module.__dict__.items() if name not in _MODULE_STATE}


def _either(mine: Any, other: Any) -> Any:
    return other if mine is None or other is None else mine


def _restore_members(layer: nn.Module, original: Original) -> None:
    """Put the old parameters, buffers and modules back; the buffers move to where the weight is by now."""
    now = layer._parameters
    parameters = {name: _either(now.get(name), p) for name, p in original.members["_parameters"].items()}
    weight, buffers = parameters.get("weight"), original.members["_buffers"]
    if weight is not None:
        cast = weight.dtype if weight.dtype != original.dtype else None
        for name, buffer in buffers.items():
            if buffer is not None:
                buffers[name] = buffer.to(weight.device, cast if buffer.is_floating_point() else None)
    modules = {name: layer._modules[name] for name in original.members["_modules"]}
    layer.__dict__.update(_parameters=parameters, _buffers=buffers, _modules=modules)


def _freeze_again(layer: nn.Module) -> None:
    affine = {name: layer._parameters.pop(name) for name in ("weight", "bias")}
    layer._buffers.pop("num_batches_tracked")
    statistics = dict(layer._buffers)
    layer._buffers.clear()
    layer._buffers.update({name: value.detach() for name, value in affine.items() if value is not None} | statistics)


def _group_of(spec: GroupSpec) -> Any:
    return spec.resolve() if spec.value is None and spec.ranks is not None else spec.value
