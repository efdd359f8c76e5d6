"""Formulas of maps, ``act(norm(x))`` and ``act(norm(x) + other)``, by the operators of the forward pass."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .boxes import Box, Formula

# By the name of an autograd node: a function of the node that returns its activation, in place where there is such.
ACTIVATIONS: dict[str, Callable[[Any], tuple[Any, ...]]] = {
    "ReluBackward0": lambda node: (F.relu, ("inplace", True)),
    "SiluBackward0": lambda node: (F.silu, ("inplace", True)),
    "HardswishBackward0": lambda node: (F.hardswish, ("inplace", True)),
    "GeluBackward0": lambda node: (F.gelu, ("approximate", node._saved_approximate)),
    "LeakyReluBackward0": lambda node: (
        F.leaky_relu, ("negative_slope", node._saved_negative_slope), ("inplace", True),
    ),
    "HardtanhBackward0": lambda node: (  # ReLU6 too
        F.hardtanh, ("min_val", node._saved_min_val), ("max_val", node._saved_max_val), ("inplace", True),
    ),
}  # fmt: skip
for _name in ("LeakyRelu", "Hardtanh"):  # in place
    ACTIVATIONS[f"{_name}Backward1"] = ACTIVATIONS[f"{_name}Backward0"]

# Layers whose operator saves its input; in place a copy of it. Hardtanh is ReLU6 too.
SAVES_INPUT = nn.SiLU, nn.Hardswish, nn.GELU, nn.Hardtanh


class Normalized:
    """A normalized map; ``apply`` computes it from the input and what it holds of the layer, O(C) numbers."""

    def __init__(self, x: Box, apply: Callable[[Tensor], Tensor], kind: tuple[Any, ...]) -> None:
        self.x, self.apply, self.layout, self.depth = x, apply, x.layout, x.depth + 1
        self.kind = *kind, *x.kind

    def compute(self) -> Tensor:
        return self.apply(self.x.get())


class Kept:
    """A map that the graph keeps anyway."""

    def __init__(self, box: Box) -> None:
        self.box, self.layout, self.depth, self.kind = box, box.layout, box.depth + 1, ("kept",)

    def compute(self) -> Tensor:
        return self.box.get()


class Activated:
    """An activation of a map."""

    def __init__(self, activation: tuple[Any, ...], inner: Formula) -> None:
        function, *pairs = activation
        arguments = dict(pairs)
        if isinstance(inner, Kept):
            arguments.pop("inplace", None)
        self.function, self.inner = partial(function, **arguments), inner
        self.layout, self.depth, self.kind = inner.layout, inner.depth, (*activation, inner.kind)

    def compute(self) -> Tensor:
        y: Tensor = self.function(self.inner.compute())
        return y


class Sum:
    """A residual sum. Addition is commutative to the bit, so the part that is computed here is overwritten."""

    def __init__(self, new: Formula, other: Formula) -> None:
        self.new, self.other = new, other
        self.layout, self.depth = new.layout, max(new.depth, other.depth)
        self.kind = "sum", new.kind, other.kind

    def compute(self) -> Tensor:
        return self.new.compute().add_(self.other.compute())
