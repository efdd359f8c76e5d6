"""The classes of converted layers: subclasses of SyncBatchNorm and of the class that the user wrote.

So code that tests for ``nn.BatchNorm2d`` finds them. Those of torch's three are defined here. Others are made once for
each pair of classes, and their qualified name contains both. Pickle looks up a class by its name in this module, which
makes the class again if it does not exist yet (see `__getattr__`).
"""

import re
import types
from importlib import import_module
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..private import input_check_of
from .batchnorm import SyncBatchNorm


class SyncBatchNorm1d(SyncBatchNorm, nn.BatchNorm1d, _BatchNorm):
    """What nn.BatchNorm1d becomes. All its bases are named, since there is code that looks at direct bases alone."""

    _check_input_dim = input_check_of(nn.BatchNorm1d)


class SyncBatchNorm2d(SyncBatchNorm, nn.BatchNorm2d, _BatchNorm):
    """What nn.BatchNorm2d becomes."""

    _check_input_dim = input_check_of(nn.BatchNorm2d)


class SyncBatchNorm3d(SyncBatchNorm, nn.BatchNorm3d, _BatchNorm):
    """What nn.BatchNorm3d becomes."""

    _check_input_dim = input_check_of(nn.BatchNorm3d)


# The class of each pair, and why it is the first one alone.
_made: dict[tuple[type, type], tuple[type[SyncBatchNorm], str | None]] = {
    (SyncBatchNorm, nn.BatchNorm1d): (SyncBatchNorm1d, None),
    (SyncBatchNorm, nn.BatchNorm2d): (SyncBatchNorm2d, None),
    (SyncBatchNorm, nn.BatchNorm3d): (SyncBatchNorm3d, None),
}
# Copies by one of these would be of the user's class, and yet hold the attributes of ours.
_COPYING = ("__reduce__", "__reduce_ex__", "__copy__", "__deepcopy__")
_OVERRIDABLE = ("_check_input_dim", "reset_parameters")  # those of the user's class come before ours


def class_of_both(
    sync_class: type[SyncBatchNorm], original: type[nn.Module]
) -> tuple[type[SyncBatchNorm], str | None]:
    """Return the class that does what ``sync_class`` does and is an ``original`` too, made once.

    Where there can be none it is ``sync_class``, with the reason. It is so without a reason, if ``sync_class`` is an
    ``original`` already, or ``original`` an nn.SyncBatchNorm (which DDP refuses on CPU) or no BatchNorm at all.
    """
    is_sync = issubclass(original, SyncBatchNorm | nn.SyncBatchNorm)
    if issubclass(sync_class, original) or is_sync or not issubclass(original, _BatchNorm):
        return sync_class, None
    if (sync_class, original) not in _made:
        _made.setdefault((sync_class, original), _make_if_possible(sync_class, original))
    return _made[sync_class, original]


def _make_if_possible(
    sync_class: type[SyncBatchNorm], original: type[nn.Module]
) -> tuple[type[SyncBatchNorm], str | None]:
    name = original.__name__
    own = [method for method in _COPYING if getattr(original, method, None) is not getattr(nn.Module, method, None)]
    if own:
        return sync_class, f"{name} has its own {own[0]}, whose copies would not synchronize"
    try:
        made = _make(sync_class, original)
    except Exception as error:  # of two metaclasses, of the order of bases, or of the user's own __init_subclass__
        return sync_class, f"no class can be both ({error})"
    if made.__mro__.index(original) < made.__mro__.index(SyncBatchNorm):
        return sync_class, f"{name} would come before SyncBatchNorm, as {sync_class.__name__} has some of its bases"
    if not can_become(original, made):
        return sync_class, f"a {name} cannot change its class to one of both"
    return made, None


def can_become(cls: type[nn.Module], other: type[nn.Module]) -> bool:
    """Whether the class of a ``cls`` can be changed to ``other``; not where ``__slots__`` differ."""
    try:
        object.__setattr__(object.__new__(cls), "__class__", other)
    except TypeError:
        return False
    return True


def _make(sync_class: type[SyncBatchNorm], original: type[nn.Module]) -> type[SyncBatchNorm]:
    def init(self: Any, *args: Any, process_group: Any = None, **options: Any) -> None:
        original.__init__(self, *args, **options)
        self.process_group = process_group

    name = "Sync" + original.__name__.lstrip("_")
    attributes = {
        "__module__": __name__,
        "__qualname__": f"{name}[{_path(sync_class)}, {_path(original)}]",
        "__doc__": f"What {original.__name__} becomes: a {sync_class.__name__} too.",
        "__init__": init,
    }
    for method in _OVERRIDABLE:
        theirs = getattr(original, method, None)
        is_ours = getattr(sync_class, method) is getattr(SyncBatchNorm, method)
        if is_ours and theirs is not getattr(_BatchNorm, method, None):
            attributes[method] = theirs
    bases = tuple(dict.fromkeys((sync_class, original, *original.__bases__)))
    return types.new_class(name, bases, exec_body=lambda namespace: namespace.update(attributes))


def _path(cls: type) -> str:
    """Write where ``cls`` is found; without dots, at which pickle would split the name."""
    return f"{cls.__module__}:{cls.__qualname__}".replace(".", "/")


def _at(path: str) -> Any:
    module, _, names = path.partition(":")
    found = import_module(module.replace("/", "."))
    for name in names.split("/"):
        found = getattr(found, name)
    return found


def __getattr__(name: str) -> Any:
    """Find the class of a qualified name, for pickle."""
    pair = re.fullmatch(r"\w+\[([^,]+), ([^,]+)\]", name)
    if pair is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return class_of_both(_at(pair[1]), _at(pair[2]))[0]
