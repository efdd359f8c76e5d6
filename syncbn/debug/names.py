"""The name of a layer: its dotted path in the largest model that holds it now.

Found by looking at all live modules, not noted by conversion: layers written by hand have a name too, and a model
converted part by part, copied, or wrapped since has its names of now.
"""

import gc
import weakref
from collections import defaultdict

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Owner = nn.Module | weakref.ref[nn.Module] | Tensor | str | None  # see name_of
Name = tuple[str, str]  # path, class of the model

_names: "weakref.WeakKeyDictionary[nn.Module, str]" = weakref.WeakKeyDictionary()
_INSIDE = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # children that stand for their parent
_OUTSIDE = _INSIDE | {"module"}  # outside of everything only


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


def _layer_of(weight: Tensor) -> nn.Module | str:
    layers = (o for o in gc.get_objects() if issubclass(type(o), _BatchNorm))
    return next((layer for layer in layers if layer._parameters.get("weight") is weight), "a layer")


def is_same(one: str, other: str) -> bool:
    """Whether two names can be of one layer: one rank may hold the model inside of a larger one."""
    (path, root), (path2, root2) = _split(one), _split(other)
    if path == path2:
        return root == root2
    return f".{path}".endswith(f".{path2}") or f".{path2}".endswith(f".{path}")


def _split(name: str) -> Name:
    path, _, root = name.partition(" (")
    return path, root


def _look() -> None:
    """Name all normalizations that live. One look takes a fraction of a second and serves all layers of the model."""
    modules = [o for o in gc.get_objects() if issubclass(type(o), nn.Module)]
    parents: defaultdict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in modules:
        for name, child in (module.__dict__.get("_modules") or {}).items():
            parents[id(child)].append((module, name))
    best: dict[int, Name] = {}
    for module in modules:
        if isinstance(module, _BatchNorm):
            path, root = _best_name(module, parents, best)
            _names[module] = f"{path} ({root})" if path else _without_path(module)


def _best_name(
    module: nn.Module, parents: dict[int, list[tuple[nn.Module, str]]], best: dict[int, Name]
) -> tuple[str, str]:
    """Return the shortest path from a module that nobody holds, alike on all ranks where there are several."""
    if id(module) not in best:
        alone = ("", type(module).__name__)
        best[id(module)] = alone  # for a module that holds itself
        names = []
        for parent, name in parents.get(id(module), ()):
            path, root = _best_name(parent, parents, best)
            if name in _INSIDE or (name in _OUTSIDE and not path):
                names.append((path, root if path else alone[1]))
            else:
                names.append((f"{path}.{name}" if path else name, root))
        best[id(module)] = min(names, key=lambda n: (n[0].count("."), n)) if names else alone
    return best[id(module)]


def _without_path(owner: nn.Module) -> str:
    return f"{type(owner).__name__}({getattr(owner, 'num_features', '')})"
