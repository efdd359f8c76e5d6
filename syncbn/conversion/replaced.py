"""Notice converted layers that another converter replaced: torch's and those built like it make new layers.

What was converted is remembered outside of the model, by weak references: the user's modules get no attribute, and
nothing lives longer. Copies and unpickled models are not known here.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..nn.batchnorm import SyncBatchNorm
from .third_party import CONVERTERS, is_sync_class

REASON = "a converted layer was here, and was replaced after syncbn.convert"
CALL_AGAIN = "Call syncbn.convert after it."
REMEDY = f"These converters do that: {CONVERTERS}. Drop it, or call syncbn.convert after it."


@dataclass
class _Call:
    """One call of convert, which warns once."""

    has_warned: bool = False


@dataclass
class _Entry:
    """The entry of a parent's ``_modules`` that holds a converted layer."""

    path: str  # "name (class of the model)"
    parent: "ref[nn.Module]"
    name: str
    others: list["ref[nn.Module]"]  # plain BatchNorms that the parent had beside it
    call: _Call
    layer: Any = field(default=None, repr=False)  # ref[nn.Module], whose callback knows the entry
    is_watched: bool = True

    def taken_by(self) -> nn.Module | None:
        """Return the BatchNorm that has taken the place of the layer, None if there is none."""
        parent, layer = self.parent(), self.layer()
        if parent is None or not self.is_watched:
            return None
        now = parent._modules.get(self.name)
        if not isinstance(now, _BatchNorm) or isinstance(now, SyncBatchNorm) or now is layer:
            return None
        # a container may give its entries other names
        has_moved = layer is not None and any(layer is child for child in parent._modules.values())
        return None if has_moved or any(now is other() for other in self.others) else now


_entries: "WeakKeyDictionary[nn.Module, dict[str, _Entry]]" = WeakKeyDictionary()
_by_layer: "WeakKeyDictionary[nn.Module, list[_Entry]]" = WeakKeyDictionary()


def watch(model: nn.Module) -> None:
    """Watch the synchronized layers of ``model`` from now on."""
    call = _Call()
    for path, parent in model.named_modules():
        layers = {name: child for name, child in parent._modules.items() if isinstance(child, SyncBatchNorm)}
        if not layers:
            continue
        others: list[ref[nn.Module]] = [
            ref(child)
            for child in parent.children()
            if isinstance(child, _BatchNorm) and not isinstance(child, SyncBatchNorm)
        ]
        entries = _entries.setdefault(parent, {})
        for name, layer in layers.items():
            if name in entries and entries[name].layer() is layer and entries[name].is_watched:
                continue
            full = f"{f'{path}.{name}'.lstrip('.')} ({type(model).__name__})"
            entry = entries[name] = _Entry(full, ref(parent), name, others, call)
            entry.layer = ref(layer, partial(_on_death, entry))
            _by_layer.setdefault(layer, []).append(entry)


def forget(layer: nn.Module) -> None:
    """Watch ``layer`` no longer: it is as the user wrote it."""
    for entry in _by_layer.pop(layer, ()):
        entry.is_watched = False


def find(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the paths of converted layers of ``model`` that were replaced, and what is there now."""
    for parent in model.modules():
        for entry in [*_entries.get(parent, {}).values()]:
            now = entry.taken_by()
            if now is not None:
                yield entry.path, now


def clear(model: nn.Module) -> None:
    """Forget the layers of ``model`` that were replaced; they were reported."""
    for parent in model.modules():
        for entry in [*_entries.get(parent, {}).values()]:
            entry.is_watched = entry.is_watched and entry.taken_by() is None


def _on_death(entry: _Entry, _: Any) -> None:
    """Warn if the layer died since another took its place; raises nothing, wherever the collector calls it."""
    if sys is None or suppress is None:  # the interpreter clears its modules
        return
    with suppress(Exception):
        now = None if sys.is_finalizing() or entry.call.has_warned else entry.taken_by()
        if now is None:
            return
        entry.call.has_warned = True
        cls = type(now)
        does = f"does not know its group. {REMEDY}" if is_sync_class(cls) else f"does not synchronize. {CALL_AGAIN}"
        message = (
            f"{entry.path} was converted by syncbn and then replaced by a {cls.__module__}.{cls.__qualname__}, which "
            f"{does} syncbn.plan(model) lists all layers that were replaced."
        )
        try:
            warnings.warn(message, stacklevel=2)
        except Warning:  # an error by the user's filter, which cannot be raised here
            print(f"syncbn: {message}", file=sys.stderr)
