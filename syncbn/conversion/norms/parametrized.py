"""Layers whose weight is computed from parameters, while a norm of weights lasts."""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

from ...nn.weights import WeightNormalization, WeightStandardization
from ..companions import Companion


@dataclass
class ParametrizedWeight(Companion):
    """A layer whose weight is computed from parameters; one of them is the weight's own object, which comes back."""

    order: list[str] = field(default_factory=list)  # names of its parameters
    classes: list[type[nn.Module]] = field(default_factory=list)  # before and after
    hooks: list[int] = field(default_factory=list)  # that came with the parametrization

    @abstractmethod
    def parametrize(self) -> None:
        """Parametrize the weight."""

    @abstractmethod
    def take_weight(self) -> nn.Parameter:
        """Return the weight's own object with the value it shall have."""

    def change(self) -> None:
        """Parametrize the weight, and keep what the layer was."""
        layer = self.module
        self.order, before, cls = [*layer._parameters], {*layer._load_state_dict_pre_hooks}, type(layer)
        self.parametrize()
        self.classes = [cls, type(layer)]
        self.hooks = [key for key in layer._load_state_dict_pre_hooks if key not in before]

    def undo(self) -> None:
        """Make the weight a parameter again; not by torch's way, which empties the class that copies share."""
        layer = self.module
        for key in self.hooks:
            layer._load_state_dict_pre_hooks.pop(key, None)
        if not is_parametrized(layer, "weight"):
            return  # the user has removed it
        now = {**layer._parameters, "weight": self.take_weight()}
        del layer._modules["parametrizations"]
        layer.__class__ = self.classes[0]
        layer.__dict__["_parameters"] = {name: now.pop(name) for name in self.order if name in now} | now

    def problem(self) -> str | None:
        """Refuse a layer that was changed since."""
        layer: Any = self.module
        is_ours = type(layer) in self.classes
        if is_ours and is_parametrized(layer):
            is_ours = [*layer.parametrizations] == ["weight"] and len(layer.parametrizations.weight) == 1
        return None if is_ours else f"{self.row.name} was parametrized or sharded after conversion; undo that first."


class StandardizedWeight(ParametrizedWeight):
    """A convolution with weight standardization."""

    def parametrize(self) -> None:
        """See `WeightStandardization`."""
        layer: Any = self.module
        groups = layer.groups if layer.transposed else None
        register_parametrization(self.module, "weight", WeightStandardization(groups), unsafe=True)

    def take_weight(self) -> nn.Parameter:
        """Return the weight as trained, not standardized."""
        weight: nn.Parameter = self.module.parametrizations.weight.original  # type: ignore[union-attr,assignment]
        return weight


class NormalizedWeight(ParametrizedWeight):
    """A layer with weight normalization: ``weight = g * v / |v|``, where v is the object that the weight was."""

    def parametrize(self) -> None:
        """Call torch's weight_norm per output channel, which loads old checkpoints too; with an operator of ours."""
        layer: Any = self.module
        weight, dim = layer._parameters["weight"], output_dim(layer)
        weight_norm(layer, dim=dim)
        layer.parametrizations.weight[0] = norm = WeightNormalization(dim)
        layer.parametrizations.weight._parameters["original1"] = weight
        with torch.no_grad():
            layer.parametrizations.weight.original0.copy_(norm.right_inverse(weight)[0])

    def take_weight(self) -> nn.Parameter:
        """Write the weight as it is now into its object; what was not trained is the same bit for bit."""
        layer: Any = self.module
        value, (g, v) = layer.weight, layer.parametrizations.weight.parameters()
        with torch.no_grad():
            is_untrained = g == layer.parametrizations.weight[0].right_inverse(v)[0]  # g is |v|
            v.copy_(torch.where(is_untrained, v, value))
        weight: nn.Parameter = v
        return weight


def output_dim(layer: nn.Module) -> int:
    """Return the dimension of a weight that counts output channels; of a transposed one those of each group."""
    return 1 if getattr(layer, "transposed", False) else 0


def own_weight(layer: Any) -> nn.Parameter:
    """Return the object that is the weight of a layer, also while it is parametrized."""
    weight: nn.Parameter = (
        [*layer.parametrizations.weight.parameters()][-1] if is_parametrized(layer) else layer.weight
    )
    return weight
