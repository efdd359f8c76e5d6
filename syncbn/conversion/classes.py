"""Which synchronized class a BatchNorm class becomes."""

import re

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..nn.activated import SyncBatchNormAct
from ..nn.batchnorm import SyncBatchNorm
from ..nn.converted import class_of_both
from .third_party import activates, is_frozen_class, only_normalizes, unfrozen_activating

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_OF_DIMENSION = {"1": nn.BatchNorm1d, "2": nn.BatchNorm2d, "3": nn.BatchNorm3d}
_REGISTERED: dict[type, type[SyncBatchNorm]] = {}


def register(batchnorm_class: type[_BatchNorm], sync_class: type[SyncBatchNorm] = SyncBatchNorm) -> None:
    """Tell conversion what a BatchNorm subclass becomes.

    A converted layer is an instance of both classes, its methods those of ``sync_class`` first; where no class can be
    both it is a ``sync_class``, and `plan` says why.

    Args:
        batchnorm_class: The exact class to convert.
        sync_class: A subclass of SyncBatchNorm that does what ``batchnorm_class`` does beside normalizing; the plain
            layer, if it does nothing else.

    A ValueError if ``sync_class`` is not a subclass of SyncBatchNorm.
    """
    if not issubclass(sync_class, SyncBatchNorm):
        raise ValueError(f"register: expected a subclass of syncbn.SyncBatchNorm, got {sync_class.__name__}.")
    _REGISTERED[batchnorm_class] = sync_class


def sync_class_of(cls: type[nn.Module], is_frozen: bool = False) -> type[SyncBatchNorm] | None:
    """Return what does the work of ``cls`` and synchronizes; None for a class that is not known.

    Args:
        cls: The class of a layer.
        is_frozen: Whether it is one whose statistics never move, see `third_party.is_frozen_layer`.
    """
    if issubclass(cls, SyncBatchNorm):
        return cls
    if activates(cls):
        return SyncBatchNormAct
    is_plain = is_frozen or cls in _PLAIN or only_normalizes(cls)
    return _REGISTERED.get(cls) or (SyncBatchNorm if is_plain else None)


def converted_class(cls: type[nn.Module], sync_class: type[SyncBatchNorm]) -> tuple[type[SyncBatchNorm], str | None]:
    """Return the class of a converted layer: a ``sync_class``, and a ``cls`` too.

    A frozen layer becomes the BatchNorm of the dimension in its name. Where the class is ``sync_class`` alone although
    ``cls`` is a BatchNorm, the reason comes with it.
    """
    original: type[nn.Module] | None = cls
    if not issubclass(cls, _BatchNorm):
        named = [re.search(r"([123])d\b", base.__name__) for base in cls.__mro__ if is_frozen_class(base)]
        dimension = next((found[1] for found in [*named, re.search(r"([123])d\b", cls.__name__)] if found), "")
        original = unfrozen_activating() if activates(cls) else _OF_DIMENSION.get(dimension)
    return (sync_class, None) if original is None else class_of_both(sync_class, original)
