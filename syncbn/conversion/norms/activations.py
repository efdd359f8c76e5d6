"""Norms that contain an activation, so that the one behind the layer is taken away: found here, and given back."""

import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...nn.activated import SyncBatchNormAct
from ...nn.converted import can_become
from ..classes import sync_class_of
from ..companions import Companion, PlanRow
from ..original import original_class, original_of
from ..rules import Action, Decision, Target
from ..third_party import activation_behind

# Exact classes of what counts as an activation in a Sequential; in a fused layer it is what is called "act".
_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Hardswish, nn.Hardtanh, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh),
)

Places = dict[nn.Module, list[tuple[nn.Module, str]]]  # of each module: the parents, and its names in them


@dataclass
class TakenActivation(Companion):
    """An activation that is the identity, since the norm before it contains one."""

    cls: type[nn.Module]  # as the user wrote it

    def change(self) -> None:
        """Make it the identity, with its attributes and hooks."""
        self.module.__class__ = nn.Identity

    def undo(self) -> None:
        """Give it its class back."""
        self.module.__class__ = self.cls


def take_activations(root: nn.Module, decisions: list[tuple[nn.Module, Decision]], target: Target) -> None:
    """Let each new norm replace the activation directly behind it, or be without its own where none is known.

    Known is the activation of a fused layer, as timm's, an activation module that follows the layer in an
    nn.Sequential, and what `third_party.activation_behind` knows, if the model has each of the two in that place
    alone. One with parameters stays. A layer that is converted by itself is not without. Warns if none is known behind
    any, of norms that do nothing without it.
    """
    names = {module: name for name, module in root.named_modules()}
    places: Places = {}
    for parent in names:
        for name, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((parent, name))
    taken = {c.module: c.cls for m in names for c in _companions(m) if isinstance(c, TakenActivation)}
    classes = {module: taken.get(module, type(module)) for module in names}  # as written
    for layer, decision in decisions:
        if decision.action is not Action.REPLACE:
            continue
        new: Any = decision.new
        found = _behind(layer, places, classes)
        if found is None and layer is root and "act" not in layer._modules:
            decision.row = decision.row._replace(reason=f"with {new.ACTIVATION}")
            continue
        if found is None:
            new.remove_activation()
            decision.row = decision.row._replace(reason=f"{new.WITHOUT}: no activation module directly behind it")
            continue
        cls = classes[found]
        decision.row = decision.row._replace(reason=f"with {new.ACTIVATION}, in place of {cls.__name__}")
        row = PlanRow(names[found], cls.__name__, "Identity", f"contained in {decision.row.name or 'the norm'}")
        decision.companions.append(TakenActivation(row, found, cls))
    _warn_of_none([decision for _, decision in decisions if decision.action is Action.REPLACE], str(target.norm))


def _warn_of_none(new: list[Decision], norm: str) -> None:
    if norm == "frn" or not new or any(d.companions or not d.row.name for d in new):
        return  # FRN normalizes without it, too
    warnings.warn(
        f"norm {norm!r} leaves the model without normalization: no activation module is known directly behind "
        f"{', '.join(decision.row.name for decision in new)}, which become weight and bias "
        "alone. A class of your own says which it is by an attribute, as in activation_behind = {'norm1': 'act1'}.",
        stacklevel=5,  # at the caller of plan or convert
    )


def _behind(layer: nn.Module, places: Places, classes: dict[nn.Module, type[nn.Module]]) -> nn.Module | None:
    """Find the activation that runs directly behind ``layer``; None if none is known that can be taken."""
    found = layer._modules.get("act") if sync_class_of(original_class(layer)) is SyncBatchNormAct else None
    if found is None or classes[found] is nn.Identity:
        found = _next_to(layer, places, classes)
    if found is None or len(places[found]) > 1 or "forward" in found.__dict__:
        return None
    is_without_state = next(found.parameters(), None) is None
    return found if is_without_state and can_become(classes[found], nn.Identity) else None


def _next_to(layer: nn.Module, places: Places, classes: dict[nn.Module, type[nn.Module]]) -> nn.Module | None:
    """Return the activation that the module which has ``layer``, in this place alone, runs after it."""
    if len(places.get(layer, ())) != 1:
        return None
    [(parent, name)] = places[layer]
    if "forward" in parent.__dict__:
        return None
    if type(parent).forward is not nn.Sequential.forward:
        return parent._modules.get(activation_behind(type(parent), name) or "")
    entries = list(parent._modules)
    following = parent._modules.get(next(iter(entries[entries.index(name) + 1 :]), ""))
    return following if following is not None and classes[following] in _ACTIVATIONS else None


def _companions(layer: nn.Module) -> list[Companion]:
    original = original_of(layer)
    return [] if original is None else original.companions
