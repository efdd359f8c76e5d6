"""Methods that were set on an instance: they hide those of its class, and of a class that it is changed to."""

from collections.abc import Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn

UNDO = (
    "delete the attribute, as in del layer.forward; accelerate's hooks by "
    "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
)


def drop_copies(layer: nn.Module, *classes: type[nn.Module]) -> None:
    """Remove the attributes that `_is_copy` finds, so that the class to come is asked.

    accelerate leaves such a ``forward`` when it removes a hook. They change nothing while the class stays.
    """
    for name in [name for name, value in vars(layer).items() if _is_copy(layer, name, value, classes)]:
        del layer.__dict__[name]


def patch_of(layer: nn.Module, to: type[nn.Module], *classes: type[nn.Module]) -> str | None:
    """Return the name of a method, set on ``layer``, that would not suit the class ``to``; None if there is none.

    That is any ``forward``, and what calls a method of ``layer`` that ``to`` lacks; but nothing that `drop_copies`
    removes.
    """
    for name, value in vars(layer).items():
        if not callable(value) or not hasattr(type(layer), name) or _is_copy(layer, name, value, classes):
            continue
        if name == "forward" or any(not _has(to, function) for function in _bound_to(layer, value)):
            return name
    return None


def _is_copy(layer: nn.Module, name: str, value: Any, classes: tuple[type[nn.Module], ...]) -> bool:
    """Whether an attribute is the method of its name of the layer's class, or of ``classes``, bound to the layer."""
    is_bound = isinstance(value, MethodType) and value.__self__ is layer
    return is_bound and any(value.__func__ is getattr(cls, name, None) for cls in (type(layer), *classes))


def _has(cls: type, function: Any) -> bool:
    return any(function in vars(base).values() for base in cls.__mro__)


def _bound_to(layer: nn.Module, value: Any, depth: int = 4) -> Iterator[Any]:
    """Yield the methods bound to ``layer`` that ``value`` may call, as far as that shows."""
    if isinstance(value, MethodType) and value.__self__ is layer:
        yield value.__func__
    parts: list[Any] = []
    if isinstance(value, partial):
        parts = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, FunctionType | MethodType):
        parts = [_contents(cell) for cell in getattr(value, "__closure__", None) or ()]
    if callable(value) and not isinstance(value, nn.Module):
        parts.append(getattr(value, "__wrapped__", None))
    for part in parts if depth else ():
        yield from _bound_to(layer, part, depth - 1)


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty one
        return None
