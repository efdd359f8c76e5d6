"""Turn a normalization layer into another kind in place, and back.

The module object stays; only its class, and what belongs to that class, is exchanged. So parameter objects, hooks,
aliases, the training flag and the user's own attributes need no copying, and the way back is exact.
"""

from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .batchnorm import SyncBatchNorm
from .collectives import GroupSpec
from .debug.names import give_number, take_number

_MODULE_STATE = frozenset(nn.Module().__dict__) - {"_non_persistent_buffers_set"}
_MEMBERS = ("_parameters", "_buffers", "_modules")


@dataclass
class Original:
    """What a turned layer was; kept on the layer as ``_syncbn_original``, outside of its state_dict."""

    cls: type[nn.Module]
    turned_into: type[nn.Module]
    norm: tuple[Any, ...] | None = None  # the norm and its keyword arguments (norms.key); None for "syncbn"
    attributes: dict[str, Any] = field(default_factory=dict)  # taken away or overwritten
    added: list[str] = field(default_factory=list)  # attributes it did not have
    members: dict[str, dict[str, Any]] = field(default_factory=dict)  # parameters, buffers, modules, if exchanged
    dtype: torch.dtype | None = None  # of what it was turned into, then


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
    norm: tuple[Any, ...] | None = None,
) -> None:
    """Turn a layer of the BatchNorm family into ``sync_class``; its parameters and buffers stay as they are."""
    original = Original(type(layer), sync_class, norm)
    if "process_group" in layer.__dict__:  # nn.SyncBatchNorm's; as a spec it can be copied and pickled
        original.attributes["process_group"] = GroupSpec(layer.__dict__.pop("process_group"))
    if "_group_spec" in layer.__dict__:
        original.attributes["_group_spec"] = layer.__dict__["_group_spec"]
    _set_class(layer, original)
    layer.__dict__["_group_spec"] = spec
    give_number(layer)


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


def to_other(layer: nn.Module, new: nn.Module, norm: tuple[Any, ...], activate: bool = False) -> None:
    """Turn ``layer`` into what ``new`` is, keeping what both have.

    Parameters and buffers of one name and shape, and modules of one name, stay the layer's own objects.

    Args:
        layer: A layer of the BatchNorm family.
        new: A fresh module whose class, attributes, parameters, buffers and modules ``layer`` gets.
        norm: The norm and its keyword arguments, kept so that converting again to the same changes nothing.
        activate: Whether ``layer`` drops and activates after normalizing, as timm's fused layers do: kept as a hook,
            unless ``new`` activates too.
    """
    attributes = _attributes(new)
    members = {kind: dict(new.__dict__[kind]) for kind in _MEMBERS}
    names = attributes.keys() | {name for kind in members.values() for name in kind}
    original = Original(
        type(layer),
        type(new),
        norm,
        {name: layer.__dict__[name] for name in names if name in layer.__dict__},
        [name for name in attributes if name not in layer.__dict__],
        {kind: dict(layer.__dict__[kind]) for kind in _MEMBERS},
    )
    for name in original.attributes:
        del layer.__dict__[name]  # an attribute would hide a parameter of its name
    _set_class(layer, original)
    layer.__dict__.update(attributes)
    for kind in ("_parameters", "_buffers"):
        mine = original.members[kind]
        layer.__dict__[kind] = {name: _either(mine.get(name), value) for name, value in members[kind].items()}
    layer._modules.update({name: value for name, value in members["_modules"].items() if name not in layer._modules})
    original.dtype = getattr(_anchor(layer), "dtype", None)
    if activate and "act" not in members["_modules"]:
        layer.register_forward_hook(_activate, prepend=True)


def as_written(layer: nn.Module) -> nn.Module:
    """Return a stand-in for ``layer`` as the user wrote it, with its tensors; ``layer`` itself is not touched."""
    twin = object.__new__(type(layer))
    twin.__dict__.update(layer.__dict__, _forward_hooks=layer._forward_hooks.copy())
    turn_back(twin)
    return twin


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
        take_number(layer)
    for name in ["_syncbn_original", *original.added]:
        layer.__dict__.pop(name, None)
    for name, value in original.attributes.items():
        is_spec = name == "process_group" and isinstance(value, GroupSpec)
        layer.__dict__[name] = _group_of(value) if is_spec else value
    if original.members:
        _restore_members(layer, original)
    elif original.cls.__name__.startswith("FrozenBatchNorm"):
        _freeze_again(layer)


def to_batchnorm(layer: SyncBatchNorm) -> None:
    """Turn a layer that was written as a SyncBatchNorm into the nn.BatchNorm of its last input's dimensions."""
    by_dims = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    layer.__class__ = by_dims.get(layer.__dict__.pop("_input_dims", 4), nn.BatchNorm2d)  # type: ignore[assignment]
    layer.__dict__.pop("_group_spec")
    take_number(layer)


def _set_class(layer: nn.Module, original: Original) -> None:
    layer.__class__ = original.turned_into
    layer.__dict__["_syncbn_original"] = original


def _activate(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Do what a fused layer does after normalizing; a forward hook of what takes its place."""
    y: Tensor = layer._modules["act"](layer._modules["drop"](output))  # type: ignore[misc]
    return y


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in module.__dict__.items() if name not in _MODULE_STATE}


def _either(mine: Any, other: Any) -> Any:
    return other if mine is None or other is None or mine.shape != other.shape else mine


def _anchor(layer: nn.Module) -> Tensor | None:
    """Return a tensor that shows where the layer is."""
    return next((t for t in chain(layer.parameters(), layer.buffers()) if t.is_floating_point()), None)


def _restore_members(layer: nn.Module, original: Original) -> None:
    """Put the old parameters, buffers and modules back; what only the old layer had moves to where the new one is."""
    anchor = _anchor(layer)
    cast = anchor.dtype if anchor is not None and anchor.dtype != original.dtype else None
    for kind in ("_parameters", "_buffers"):
        now = layer.__dict__[kind]
        old = {name: _moved(value, anchor, cast) for name, value in original.members[kind].items()}
        layer.__dict__[kind] = {name: _either(now.get(name), value) for name, value in old.items()}
    layer.__dict__["_modules"] = {name: layer._modules[name] for name in original.members["_modules"]}


def _moved(old: Tensor | None, anchor: Tensor | None, cast: torch.dtype | None) -> Tensor | None:
    if old is None or anchor is None:
        return old
    new = old.to(anchor.device, cast if old.is_floating_point() else None)
    return nn.Parameter(new, old.requires_grad) if new is not old and isinstance(old, nn.Parameter) else new


def _freeze_again(layer: nn.Module) -> None:
    affine = {name: layer._parameters.pop(name) for name in ("weight", "bias")}
    layer._buffers.pop("num_batches_tracked")
    statistics = dict(layer._buffers)
    layer._buffers.clear()
    layer._buffers.update({name: value.detach() for name, value in affine.items() if value is not None} | statistics)


def _group_of(spec: GroupSpec) -> Any:
    return spec.resolve() if spec.value is None and spec.ranks is not None else spec.value
