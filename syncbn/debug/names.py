"""The name of a layer: its dotted path in the largest model that holds it now.

Found by looking at all live modules, not noted by conversion: layers written by hand have a name too, and a model
converted part by part, copied, or wrapped since has its names of now. Two models may name their layers alike (those of
a GAN, both nn.Sequential): then the order in which the layers were made tells them apart.
"""

import gc
import weakref
from collections import defaultdict
from collections.abc import Collection
from itertools import count
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Owner = nn.Module | weakref.ref[nn.Module] | Tensor | str | None  # see name_of


class _Name(NamedTuple):
    path: str
    root: str  # class of the model
    size: int  # modules in it


_names: "weakref.WeakKeyDictionary[nn.Module, str]" = weakref.WeakKeyDictionary()
_exchanged: "defaultdict[str, weakref.WeakSet[nn.Module]]" = defaultdict(weakref.WeakSet)  # layers, by name
_sought: set[str] = set()  # names of other ranks
_numbers = count()
_NUMBER = "_syncbn_number"
_INSIDE = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # children that stand for their parent
_OUTSIDE = _INSIDE | {"module"}  # outside of everything only


def give_number(layer: nn.Module) -> None:
    """Number a layer that is made, or converted; its copies keep the number."""
    layer.__dict__.setdefault(_NUMBER, next(_numbers))


def take_number(layer: nn.Module) -> None:
    """Undo `give_number`."""
    layer.__dict__.pop(_NUMBER, None)


def name_of(owner: Owner) -> str:
    """Return "path (Class of the model)" for a layer, given as such or by its weight.

    A string is the name itself, None the function.
    """
    if isinstance(owner, Tensor):
        owner = _layer_of(owner)
    if isinstance(owner, weakref.ref):
        owner = owner() or "a layer that is gone"
    if owner is None:
        return "sync_batch_norm"
    if isinstance(owner, str):
        return owner
    if owner not in _names:
        _look()
    return _names.get(owner) or _without_path(owner)


def name_for_exchange(owner: Owner) -> tuple[str, int]:
    """Return the name of a layer that exchanges, "path (Class #2)" if it is the second of its name, and its number."""
    name = name_of(owner)
    if not isinstance(owner, nn.Module):
        return name, -1
    _exchanged[name].add(owner)
    numbers, mine = {_number(layer) for layer in _exchanged[name]}, _number(owner)
    if len(numbers) == 1:
        return name, mine
    return f"{name.removesuffix(')')} #{sorted(numbers).index(mine) + 1})", mine


def _number(layer: nn.Module) -> int:
    return int(layer.__dict__.get(_NUMBER, -1))


def names_here(*others: str) -> set[str]:
    """Return the names of this process's layers, those of ``others`` too that have not been asked for so far."""
    whole = {_split(other)[0] for other in others} - _sought - set(_names.values())
    if whole:
        _sought.update(whole)
        _look()
    return set(_names.values())


def _layer_of(weight: Tensor) -> nn.Module | str:
    layers = (o for o in gc.get_objects() if issubclass(type(o), _BatchNorm))
    return next((layer for layer in layers if layer._parameters.get("weight") is weight), "a layer")


def is_same(one: str, other: str, here: Collection[str] = ()) -> bool:
    """Whether two names can be of one layer: one rank may hold the model inside of a larger one.

    Args:
        one: A name.
        other: Another rank's.
        here: Names of one rank's layers: two of them are not of one layer.
    """
    (name, path, root, _), (name2, path2, root2, _) = _split(one), _split(other)
    if path == path2 or root == root2 or (name in here and name2 in here):
        return name == name2
    return f".{path}".endswith(f".{path2}") or f".{path2}".endswith(f".{path}")


def is_another_of_the_name(one: str, other: str) -> bool:
    """Whether both say which of its name they are, and it is not the same."""
    number, number2 = _split(one)[3], _split(other)[3]
    return "" not in (number, number2) and number != number2


def _split(name: str) -> tuple[str, str, str, str]:
    """Return the name without its "#", path, class, and what stands behind the "#"."""
    front, mark, number = name.removesuffix(")").rpartition(" #")
    whole = f"{front})" if mark else name
    path, _, root = whole.partition(" (")
    return whole, path, root, number if mark else ""


def _look() -> None:
    """Name all normalizations that live. One look takes a fraction of a second and serves all layers of the model."""
    modules = [o for o in gc.get_objects() if issubclass(type(o), nn.Module)]
    parents: defaultdict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in modules:
        for name, child in (module.__dict__.get("_modules") or {}).items():
            parents[id(child)].append((module, name))
    best: dict[int, _Name] = {}
    for module in modules:
        if isinstance(module, _BatchNorm):
            path, root, _ = _best_name(module, parents, best)
            _names[module] = f"{path} ({root})" if path else _without_path(module)


def _best_name(module: nn.Module, parents: dict[int, list[tuple[nn.Module, str]]], best: dict[int, _Name]) -> _Name:
    """Return the shortest path from the largest module that nobody holds, the same on all ranks."""
    if id(module) not in best:
        alone = _Name("", type(module).__name__, 0 if parents.get(id(module)) else sum(1 for _ in module.modules()))
        best[id(module)] = alone  # for a module that holds itself
        names = []
        for parent, name in parents.get(id(module), ()):
            path, root, size = _best_name(parent, parents, best)
            if name in _INSIDE or (name in _OUTSIDE and not path):
                names.append(_Name(path, root if path else alone.root, size))
            else:
                names.append(_Name(f"{path}.{name}" if path else name, root, size))
        best[id(module)] = min(names, key=lambda n: (-n.size, n.path.count("."), n)) if names else alone
    return best[id(module)]


def _without_path(owner: nn.Module) -> str:
    return f"{type(owner).__name__}({getattr(owner, 'num_features', '')})"
