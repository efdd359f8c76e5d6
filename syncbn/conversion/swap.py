"""Swap a normalization layer for another kind in place, and restore it.

The module object stays; only its class, and what belongs to that class, is exchanged. So parameter objects, hooks,
aliases, the training flag and the user's own attributes need no copying, and the way back is exact.
"""

from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.groups import GroupSpec
from ..nn.batchnorm import SyncBatchNorm
from ..nn.converted import SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d
from . import frozen, replaced
from .companions import Companion
from .original import Original, original_of

PLAIN = (SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d)
_MODULE_STATE = frozenset(nn.Module().__dict__) - {"_non_persistent_buffers_set"}
_MEMBERS = ("_parameters", "_buffers", "_modules")


def swap_to_sync(
    layer: nn.Module,
    sync_class: type[SyncBatchNorm],
    spec: GroupSpec,
    norm: tuple[Any, ...] | None = None,
) -> None:
    """Make a layer of the BatchNorm family a ``sync_class``; its parameters and buffers stay as they are."""
    original = Original(type(layer), sync_class, norm)
    if "process_group" in layer.__dict__:  # nn.SyncBatchNorm's; as a spec it can be copied and pickled
        original.attributes["process_group"] = GroupSpec(layer.__dict__.pop("process_group"))
    _set_class(layer, original)
    original.sync_state = sync_class._adopt(layer, spec)  # type: ignore[arg-type]


def swap_frozen_to_sync(layer: nn.Module, sync_class: type[SyncBatchNorm], spec: GroupSpec) -> None:
    """Make a FrozenBatchNorm2d a ``sync_class``: its weight and bias, which are buffers, become parameters."""
    eps = frozen.eps_of(layer)
    assert eps is not None
    original = Original(type(layer), sync_class)
    _set_class(layer, original)
    sync_class._adopt(layer, spec)  # type: ignore[arg-type]
    original.frozen = frozen.to_parameters(layer, eps)


def swap_to_other(layer: nn.Module, new: nn.Module, norm: tuple[Any, ...], activate: bool = False) -> None:
    """Make ``layer`` what ``new`` is, keeping what both have.

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
        attributes={name: layer.__dict__[name] for name in names if name in layer.__dict__},
        added=[name for name in attributes if name not in layer.__dict__],
        members={kind: dict(layer.__dict__[kind]) for kind in _MEMBERS},
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


def change_companions(layer: nn.Module, companions: list[Companion]) -> None:
    """Change the modules that change with a swapped layer."""
    original = original_of(layer)
    assert original is not None
    for companion in companions:
        companion.change()
        original.companions.append(companion)


def original_twin(layer: nn.Module) -> nn.Module:
    """Return a stand-in for ``layer`` as the user wrote it, with its tensors; ``layer`` itself is not touched."""
    twin = object.__new__(type(layer))
    twin.__dict__.update(layer.__dict__, _forward_hooks=layer._forward_hooks.copy())
    original = original_of(layer)
    if original is not None:  # its companions are the layer's
        twin.__dict__["_syncbn_original"] = replace(original, companions=[])
    restore(twin)
    return twin


def restore(layer: nn.Module) -> None:
    """Make a swapped layer exactly what the user wrote: class, attributes and buffers; parameters as trained."""
    original = original_of(layer)
    if original is None:
        return
    replaced.forget(layer)
    for companion in reversed(original.companions):
        companion.undo()
    for key in [key for key, hook in layer._forward_hooks.items() if hook is _activate]:
        del layer._forward_hooks[key]
    if isinstance(layer, SyncBatchNorm):
        dims = layer._release(original.sync_state)
        if dims and issubclass(original.cls, SyncBatchNorm):
            layer.__dict__["_last_dims"] = dims
    layer.__class__ = original.cls
    for name in ["_syncbn_original", *original.added]:
        layer.__dict__.pop(name, None)
    for name, value in original.attributes.items():
        layer.__dict__[name] = value.given() if name == "process_group" and isinstance(value, GroupSpec) else value
    if original.members:
        _restore_members(layer, original)
    elif original.frozen is not None:
        frozen.freeze_again(layer, original.frozen)


def swap_to_batchnorm(layer: SyncBatchNorm) -> None:
    """Make a layer that was written as one of PLAIN nn.BatchNorm; of its last input's dimensions, if none is said."""
    by_dims = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    replaced.forget(layer)
    dims = layer._release({})
    is_one = [cls for cls in by_dims.values() if isinstance(layer, cls)]
    layer.__class__ = is_one[0] if is_one else by_dims.get(dims or 4, nn.BatchNorm2d)  # type: ignore[assignment]


def _set_class(layer: nn.Module, original: Original) -> None:
    layer.__class__ = original.swapped_to
    layer.__dict__["_syncbn_original"] = original


def _activate(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Do what a fused layer does after normalizing; a forward hook of what takes its place."""
    for module in (layer._modules.get("drop"), layer._modules.get("act")):
        output = output if module is None else module(output)
    return output


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
