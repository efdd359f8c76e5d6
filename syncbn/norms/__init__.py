"""The other arms: normalizations that can take a BatchNorm's place, one file each, and their registry.

Each entry is a function from the BatchNorm layer and the norm's own keywords to the module that replaces it.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any

from torch import nn

from .groupnorm import groupnorm

REGISTRY: dict[str, Callable[..., nn.Module]] = {"gn": groupnorm}

__all__ = ["REGISTRY", "groupnorm"]


def check(norm: str, options: dict[str, Any]) -> None:
    """Raise a ValueError for a norm that does not exist, listing those that do, or for words it does not take."""
    if norm not in {"bn", "syncbn", *REGISTRY}:
        raise ValueError(f"unknown norm {norm!r}: expected one of {', '.join(['bn', 'syncbn', *sorted(REGISTRY)])}.")
    words = list(signature(REGISTRY[norm]).parameters)[1:] if norm in REGISTRY else []
    unknown = [word for word in options if word not in words]
    if unknown:
        raise ValueError(f"norm {norm!r} takes {', '.join(words) or 'no words'}, not {', '.join(unknown)}.")


def make(norm: str, layer: nn.Module, options: dict[str, Any]) -> nn.Module:
    """Make the module of the registered ``norm`` that takes the place of ``layer``."""
    return REGISTRY[norm](layer, **options)
