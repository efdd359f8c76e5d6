"""Which synchronized class a BatchNorm class becomes."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..nn.activated import SyncBatchNormAct
from ..nn.batchnorm import SyncBatchNorm
from .third_party import activates, is_frozen_class

_PLAIN: dict[type, type[SyncBatchNorm]] = dict.fromkeys(
    (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, SyncBatchNorm), SyncBatchNorm
)
_REGISTERED: dict[type, type[SyncBatchNorm]] = {}


def register(batchnorm_class: type[_BatchNorm], sync_class: type[SyncBatchNorm] = SyncBatchNorm) -> None:
    """Tell conversion what a BatchNorm subclass becomes.

    Args:
        batchnorm_class: The exact class to convert.
        sync_class: A subclass of SyncBatchNorm that does what ``batchnorm_class`` does beside normalizing; the plain
            layer, if it does nothing else.

    A ValueError if ``sync_class`` is not a subclass of SyncBatchNorm.
    """
    if not issubclass(sync_class, SyncBatchNorm):
        raise ValueError(f"register: expected a subclass of syncbn.SyncBatchNorm, got {sync_class.__name__}.")
    _REGISTERED[batchnorm_class] = sync_class


def sync_class_of(cls: type[nn.Module]) -> type[SyncBatchNorm] | None:
    """Return what ``cls`` becomes; None for a class that is not known."""
    if issubclass(cls, SyncBatchNorm):
        return cls
    if activates(cls):
        return SyncBatchNormAct
    is_frozen = is_frozen_class(cls) and not issubclass(cls, _BatchNorm)
    return _REGISTERED.get(cls) or _PLAIN.get(cls) or (SyncBatchNorm if is_frozen else None)
